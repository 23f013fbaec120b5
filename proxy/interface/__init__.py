"""The SQL interface: functions and settings named ``ruvector_`` and ``ruvector.`` that the proxy answers.

signatures  the functions: arguments, results, who may call them
records     what a text with calls in it is turned into: plain immutable records
arguments   from the arguments as written to one SQL text that the server evaluates
prepared    PREPARE and EXECUTE of a text with calls
rewriting   a text with calls -> the same text in which the server reads the answers
settings    names and values of ``SET ruvector.*``, and the WITH (...) clause of a SELECT
questions   what is asked of the server, and what of the learner, for one call

Theory
------
A call is replaced, in the client's own text, by an expression that reads the answer from a setting that is
local to the transaction: ``jsonb_to_recordset(current_setting('ruvector_proxy.answer_0')) AS (...)``.  So
everything around it (aliases, joins, CREATE TABLE AS, types, formats, the descriptions before execution) is
the server's own, a prepared statement stays one, and no hidden parameter is needed: the bound ones stay in
the text, where they keep their types.

Directly before the statement is executed the proxy lets the server evaluate the arguments, in the client's
own transaction and with its search_path, together with the facts on which authority rests; asks the learner;
and puts the answer in the setting (`proxy.session.calling`).
"""
