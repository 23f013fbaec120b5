"""The learning engine: what was measured about vector queries, and what follows from it.

Pure (no input, no output, no clock, seeded), in the order in which evidence becomes a choice:

    records         what proxy and learner tell each other           values      one text for each value
    trajectory      recent queries of a template                     verdict     how a query went, in words
    repetition      how often each query is asked                    projection  a few directions for all
    dialects        what can be set, as arms                         curves      recall and cost of the arms
    contexts        an arm per filter value and per k                density     how crowded the table is
    difficulty      how hard a query is                              calibration  the price; the gate
    reasoning_bank  patterns: store, look up, merge, prune           distillation  all of it into one policy
    lookup          a per-query policy, evaluated                    optimizer   what a query gets
    schedule        what to measure next                             budget      and how much of it
    audit           recall of what was really served                 policy      when to distil and publish
    advice          what a person could change                       drift       what has changed since
    watch           one template under watch                         feedback    what users say, as a target
    explain         why a query gets what it gets                    choosing    the query to measure next

In touch with the world:

    channel         frames between worker and learner                server      the socket they come in by
    upstream        side connections to the database                 inventory   indexes, confirmed by EXPLAIN
    plans           reading EXPLAIN                                   tablestats  value shares, row samples
    binding         any argument as a parameter                      probe       one query measured
    ratings         a user's rating, taken to the server              tolls       what a lookup takes here
    truth           exact answers for large tables                   labelling   one label, or several at once
    answering       questions to the learner
    measuring       one measurement after another                    registry    what is known of templates
    store           SQLite                                            metrics     for Prometheus
    worker          the learner's process
"""
