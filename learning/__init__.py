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
    floors          as many rows as LIMIT asks for, from the start   canary      a new policy on trial
    steering        another target for one query                     naming      ids that applications choose
    exchange        patterns as a document                           anonymizer  what is kept without values

In touch with the world:

    channel         frames between worker and learner                server      the socket they come in by
    upstream        side connections to the database                 names       what names mean on them
    inventory       indexes, confirmed by EXPLAIN                    plans       reading EXPLAIN
    tablestats      value shares, row samples                        binding     any argument as a parameter
    probe           one query measured                               truth       exact answers in large tables
    labelling       one label, or several at once                    tolls       what a lookup takes here
    ratings         a user's rating, taken to the server             benchmarks  those that a client asks for
    intake          frames and traffic, taken in                     measuring   one measurement after another
    registry        what is known of templates                       publishing  policies going out
    answering       questions to the learner                         overview    what the dashboard shows
    service         calls of clients, bounded                        functions   who answers which call
    options         what holds for each table                        patterns    documents, in and out
    store           what is kept, in SQLite                          sqlite_file  its file, schema and damage
    stored          the same, read by other programs                 metrics     for Prometheus
    worker          the learner's process

Several replicas on one store:

    sharing         who leads, which policy is in force              shared      the store, in PostgreSQL
    shared_schema   its schema, and whether it may be used           outbox      what the leader is to be told
    pieces          a snapshot in pieces, named by content
"""
