"""The benchmark suite, ``make bench``: what the proxy brings and what it costs, for those who doubt it.

records      what a run found, as data
statistics   derived systems, intervals by bootstrap, verdicts
queries      statements, clients, exact answers
tables       the tables, their filter columns, their indexes
systems      the settings that are compared
traffic      disjoint and repeating queries
stage        what the scenarios of a run share: server, learning, measuring
contest      the protocol of most scenarios: tune, learn, measure, judge
scenarios/   one module for each family of scenarios
plots        one picture for each record
report       tables, and the page docs/benchmarks.md
compare      do two runs give the same verdicts?
own          the same contest on a user's own table
loaders      vectors from other people's files
main         the command
"""
