"""Coverage-guided fuzzing with atheris (libFuzzer): one target for each family of decoders, and the session.

targets    what is fuzzed, and what must hold: plain functions of bytes, usable without atheris
runner     ``python -m tests.fuzz``: runs targets under atheris, each in a process of its own
seeds      makes the corpus out of real messages: ``python -m tests.fuzz.seeds``
corpus/    where a run starts from, one directory a target; and every input that once failed
"""
