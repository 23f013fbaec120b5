-- AUTOCOMMIT off, ON_ERROR_ROLLBACK, savepoints, and what the application itself sets.
\set PROMPT1 '%x> '
\set AUTOCOMMIT off
SELECT id FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 1;
INSERT INTO items VALUES (1000, 'new', 'new', '[1000,500,1]');
SELECT id FROM items ORDER BY embedding <-> '[1000,500,1]' LIMIT 1;
ROLLBACK;
SELECT id FROM items ORDER BY embedding <-> '[1000,500,1]' LIMIT 1;
COMMIT;
\set ON_ERROR_ROLLBACK on
SELECT id FROM items ORDER BY embedding <-> '[2,1,1]' LIMIT 1;
SELECT no_such_column FROM items;
SELECT id FROM items ORDER BY embedding <-> '[1,2]' LIMIT 1;
SELECT id FROM items ORDER BY embedding <-> '[3,1.5,1]' LIMIT 1;
SHOW hnsw.ef_search;
COMMIT;
\set ON_ERROR_ROLLBACK off
SELECT no_such_column;
SELECT id FROM items ORDER BY embedding <-> '[3,1.5,1]' LIMIT 1;
ROLLBACK;
\set AUTOCOMMIT on
BEGIN;
SET TRANSACTION ISOLATION LEVEL SERIALIZABLE;
SELECT id FROM items ORDER BY embedding <-> '[4,2,1]' LIMIT 1;
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
ROLLBACK;
BEGIN;
SAVEPOINT a;
SELECT id FROM items ORDER BY embedding <-> '[5,2.5,1]' LIMIT 1;
ROLLBACK TO a;
SHOW work_mem;
SET LOCAL work_mem = '5MB';
SELECT id FROM items ORDER BY embedding <-> '[5,2.5,1]' LIMIT 1;
SHOW work_mem;
RELEASE a;
SHOW work_mem;
COMMIT AND CHAIN;
SHOW work_mem;
SELECT id FROM items ORDER BY embedding <-> '[6,3,1]' LIMIT 1;
ROLLBACK AND NO CHAIN;
SET hnsw.ef_search = 200;
SELECT id FROM items ORDER BY embedding <-> '[7,3.5,1]' LIMIT 1;
SHOW hnsw.ef_search;
RESET hnsw.ef_search;
SELECT id FROM items ORDER BY embedding <-> '[7,3.5,1]' LIMIT 1;
SHOW hnsw.ef_search;
BEGIN \; SELECT id FROM items ORDER BY embedding <-> '[8,4,1]' LIMIT 1 \; SHOW hnsw.ef_search;
SHOW hnsw.ef_search;
COMMIT;
BEGIN;
DECLARE c SCROLL CURSOR FOR SELECT id FROM items ORDER BY embedding <-> '[9,4.5,1]';
FETCH 2 FROM c;
SELECT id FROM items ORDER BY embedding <-> '[10,5,1]' LIMIT 1;
FETCH BACKWARD 1 FROM c;
MOVE 3 IN c;
CLOSE c;
COMMIT;
PREPARE search (vector) AS SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 2;
EXECUTE search('[11,5.5,1]');
BEGIN;
EXECUTE search('[12,6,1]');
SHOW work_mem;
COMMIT;
DISCARD ALL;
EXECUTE search('[13,6.5,1]');
SELECT id FROM items ORDER BY embedding <-> '[13,6.5,1]' LIMIT 1;
