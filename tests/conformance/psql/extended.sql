-- The extended protocol: bound parameters, named statements, pipelines.
SELECT $1::int + $2::int AS sum \bind 3 4 \g
SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 3 \bind '[100,50,1]' \gx
SELECT id FROM items ORDER BY embedding <-> $1 LIMIT $2 \bind '[100,50,1]' 1 \gset
\echo :id
SELECT id FROM items WHERE section = $1 ORDER BY embedding <-> $2 LIMIT 1 \parse search
\bind_named search 'section 0' '[4,2,1]' \g
\bind_named search 'section 1' '[4,2,1]' \g
\bind_named search 'section 2' '[4,2,1]' \g
\bind_named search 'section 3' 'no vector' \g
\bind_named search 'section 3' '[4,2,1]' \g
\bind_named search 'section 3' \g
SELECT name, from_sql FROM pg_prepared_statements WHERE name = 'search';
\close_prepared search
\bind_named search 'section 3' '[4,2,1]' \g
\startpipeline
SELECT 1 AS a \bind \sendpipeline
SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 1 \bind '[11,5.5,1]' \sendpipeline
SELECT $1::text AS c \bind 'ö' \sendpipeline
\flushrequest
\getresults
SELECT 1 / $1::int \bind 0 \sendpipeline
SELECT 'skipped' \bind \sendpipeline
\syncpipeline
SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 1 \bind '[12,6,1]' \sendpipeline
\endpipeline
\startpipeline
BEGIN \bind \sendpipeline
SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 1 \bind '[13,6.5,1]' \sendpipeline
SHOW hnsw.ef_search \bind \sendpipeline
SHOW work_mem \bind \sendpipeline
COMMIT \bind \sendpipeline
\endpipeline
SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 1 \bind '[14,7,1]' \g
SHOW hnsw.ef_search;
