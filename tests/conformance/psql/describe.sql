-- What psql asks the catalogues, and what it shows of a statement without running it.
\d items
\d+ items
\dt
\di
\df+ set_limit
\dx vector
\dT vector
\l psql_describe
SELECT id, embedding FROM items ORDER BY embedding <-> '[5,2.5,1]' LIMIT 3 \gdesc
SELECT 1 AS number, 'x'::text AS word, NULL AS nothing \gdesc
INSERT INTO items VALUES (0) \gdesc
SELECT nonsense \gdesc
\sf pg_catalog.substring(text, text)
