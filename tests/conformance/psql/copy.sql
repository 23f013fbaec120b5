-- COPY in both directions, by the client and by the server, with errors.
\copy items TO 'items.txt'
CREATE TABLE again (LIKE items);
\copy again FROM 'items.txt'
SELECT count(*), sum(id), min(embedding::text), max(embedding::text) FROM again;
\copy (SELECT id, section FROM items ORDER BY embedding <-> '[30,15,1]' LIMIT 3) TO STDOUT (FORMAT csv, HEADER)
COPY (SELECT maß FROM (VALUES ('größe'), ('大小')) AS v (maß)) TO STDOUT;
COPY größen FROM STDIN;
ä	1
ö	2
\.
COPY größen FROM STDIN (FORMAT csv);
ü,3
ß,keine Zahl
\.
SELECT * FROM größen;
\copy items TO 'items.bin' (FORMAT binary)
TRUNCATE again;
\copy again FROM 'items.bin' (FORMAT binary)
SELECT count(*), sum(id) FROM again;
\copy no_such_table FROM 'items.txt'
\copy again FROM 'no-such-file.txt'
BEGIN;
SELECT id FROM items ORDER BY embedding <-> '[31,15.5,1]' LIMIT 1;
COPY größen FROM STDIN;
ï	4
\.
SHOW work_mem;
SELECT id FROM items ORDER BY embedding <-> '[32,16,1]' LIMIT 1;
COMMIT;
SELECT 1 AS first \; COPY (SELECT 2) TO STDOUT \; SELECT 3 AS third;
SELECT * FROM größen ORDER BY wert;
