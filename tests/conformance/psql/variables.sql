-- Results into variables, results as statements, results in other forms.
SELECT id AS nearest, body FROM items ORDER BY embedding <-> '[70,35,1]' LIMIT 1 \gset found_
\echo :found_nearest :'found_body'
SELECT id FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 2 \gset
SELECT id AS nobody FROM items WHERE id < 0 \gset
SELECT format('SELECT %s AS made, id FROM items ORDER BY embedding <-> ''[%s,1,1]'' LIMIT 1', i, i)
FROM generate_series(1, 3) i \gexec
SELECT id, section FROM items ORDER BY embedding <-> '[9,4.5,1]' LIMIT 3 \gx
SELECT id, section FROM items WHERE id < 4 ORDER BY id \g (format=unaligned fieldsep=| tuples_only)
SELECT section, id % 3 AS rest, count(*) FROM items GROUP BY 1, 2 ORDER BY 1, 2 \crosstabview section rest count
SELECT 1 AS one \; SELECT 2 AS two \; SELECT id FROM items ORDER BY embedding <-> '[3,1.5,1]' LIMIT 1;
\echo :ROW_COUNT :SQLSTATE :ERROR
SELECT id FROM items ORDER BY embedding <-> '[3,1.5,1]' LIMIT 4;
\echo :ROW_COUNT :SQLSTATE :ERROR
SELECT 1/0;
\echo :ROW_COUNT :SQLSTATE :ERROR :LAST_ERROR_MESSAGE
\set FETCH_COUNT 7
SELECT id FROM items ORDER BY id LIMIT 20;
SELECT id FROM items ORDER BY embedding <-> '[50,25,1]' LIMIT 1;
SELECT id / (id - 15) FROM items ORDER BY id;
\set FETCH_COUNT 0
\set SINGLELINE on
SELECT id FROM items ORDER BY embedding <-> '[8,4,1]' LIMIT 1
SELECT 'single line'
