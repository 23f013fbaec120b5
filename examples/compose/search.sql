\set id random(1, 20000)
\set category random_zipfian(1, 40, 1.2) - 1
SELECT embedding AS wanted FROM items WHERE id = :id \gset
SELECT id FROM items ORDER BY embedding <=> :wanted LIMIT 10;
SELECT id FROM items WHERE category = :category ORDER BY embedding <=> :wanted LIMIT 10;
