-- Positions in errors, counted in characters, also behind multi-byte text; contexts, details and hints.
\set VERBOSITY verbose
SELECT id FROM items ORDER BY embedding <-> '[1,2]' LIMIT 1;
\set VERBOSITY default
SELECT nonsense FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 1;
SELECT 'größe → 大小', nonsense FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 1;
SELECT 'größe → 大小 😀' AS maß,
       maß, /* ünd → 大 */ nonsense
FROM items
ORDER BY embedding <-> '[1,0.5,1]' LIMIT 1;
SELECT maß, wert FROM größen ORDER BY unwert;
SELECT id FROM items ORDER BY embedding <-> '[1,0.5,1]'::vektor LIMIT 1;
SELECT id FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 'viele';
SELECT id FROM items ORDER BY embedding <-> '[1,0.5,eins]' LIMIT 1;
SELECT id FRM items;
SELECT 'ü' \; SELECT id FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 1 \; SELECT 'ü', fehler \; SELECT 'nie';
SELECT 'ü' \; SELECT id, 'ü', fehler FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 1 \; SELECT 'nie';
BEGIN;
SELECT 'ü', id, fehler FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 1;
ROLLBACK;
DO $$ BEGIN PERFORM 'ü', id FROM items ORDER BY embedding <-> '[1,2]' LIMIT 1; END $$;
CREATE FUNCTION nearest(vector) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
  RAISE NOTICE 'looking for %', $1;
  RETURN (SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 1);
END $$;
SELECT nearest('[20,10,1]');
SELECT nearest('[1,2]');
\errverbose
SELECT id FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT -1;
SELECT id, 1 / (id - 1) FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 3;
SET client_min_messages = debug1;
SELECT id FROM items ORDER BY embedding <-> '[21,10.5,1]' LIMIT 1;
RESET client_min_messages;
COMMIT;
SET LOCAL work_mem = '5MB';
