"""What the hop costs: direct, through pgbouncer and through the proxy, in one run (docs/performance.md).

results   figures by group, case and way; medians of ratios within one round
ways      the three ways to the server, and what their processes take
raw       a client that costs next to nothing
ordinary  pgbench -S: throughput, latency, processor time; two workers
bulk      large results, COPY, a storm of connections
vectors   vector queries: added latency, adapted and not, the learner at work and at rest
idle      memory of idle connections, up to 10,000 of them before a stub server
report    tables and picture
"""
