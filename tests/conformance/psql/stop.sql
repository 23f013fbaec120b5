-- status: 3
-- The first error ends the script with status 3.
\set ON_ERROR_STOP on
SELECT id FROM items ORDER BY embedding <-> '[1,0.5,1]' LIMIT 1;
SELECT id FROM items ORDER BY embedding <-> 'no vector' LIMIT 1;
SELECT 'never';
