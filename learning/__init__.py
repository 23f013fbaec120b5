"""The learning engine: what was measured about vector queries, and what follows from it.

Pure parts (no input, no output, no clock, seeded): records, trajectory, verdict, distillation, reasoning_bank,
optimizer, dialects, values.  Parts that talk to the world: probe (shadow queries), store (persistence),
channel (frames between worker and learner), worker (the learner's loop).
"""
