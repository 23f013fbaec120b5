-- status: 2
-- Connecting again, other roles, other encodings, notifications, timeouts, repetition.
LISTEN news;
NOTIFY news;
SELECT id FROM items ORDER BY embedding <-> '[40,20,1]' LIMIT 1;
SELECT id FROM items ORDER BY embedding <-> '[41,20.5,1]' LIMIT 1 \watch interval=0.05 count=3
SET statement_timeout = '100ms';
SELECT pg_sleep(5), id FROM items ORDER BY embedding <-> '[42,21,1]' LIMIT 1;
SELECT id FROM items ORDER BY embedding <-> '[42,21,1]' LIMIT 1;
RESET statement_timeout;
SET client_encoding = 'LATIN1';
SELECT 'ASCII', id FROM items ORDER BY embedding <-> '[43,21.5,1]' LIMIT 1;
SELECT 'ASCII', nonsense FROM items ORDER BY embedding <-> '[43,21.5,1]' LIMIT 1;
RESET client_encoding;
CREATE ROLE visitor LOGIN;
GRANT SELECT ON items TO visitor;
SET ROLE visitor;
SELECT current_user, id FROM items ORDER BY embedding <-> '[44,22,1]' LIMIT 1;
SELECT * FROM größen;
RESET ROLE;
CREATE SCHEMA other;
CREATE TABLE other.items AS SELECT * FROM items WHERE id > 200;
SET search_path = other, public;
SELECT id FROM items ORDER BY embedding <-> '[45,22.5,1]' LIMIT 1;
RESET search_path;
\c - visitor
SELECT current_user, id FROM items ORDER BY embedding <-> '[46,23,1]' LIMIT 1;
INSERT INTO items VALUES (0);
\c - postgres
\c "options='-c hnsw.ef_search=99'"
SHOW hnsw.ef_search;
SELECT id FROM items ORDER BY embedding <-> '[47,23.5,1]' LIMIT 1;
SHOW hnsw.ef_search;
SELECT lo_create(4711);
SELECT lo_put(4711, 0, '\x00ff');
\lo_export 4711 'large-object'
\lo_unlink 4711
SET idle_in_transaction_session_timeout = '100ms';
BEGIN;
SELECT id FROM items ORDER BY embedding <-> '[48,24,1]' LIMIT 1;
\! sleep 0.4
SELECT 'the session is gone, and so is psql';
