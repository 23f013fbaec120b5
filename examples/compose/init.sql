-- A table to search: 20,000 vectors of 64 dimensions around 200 centres, in 40 categories of very different size.
CREATE EXTENSION vector;
CREATE TABLE items (id integer PRIMARY KEY, category integer NOT NULL, embedding vector(64) NOT NULL);
CREATE TEMPORARY TABLE centres AS
    SELECT centre, dimension, random() - 0.5 AS value FROM generate_series(0, 199) centre, generate_series(1, 64) dimension;
INSERT INTO items
    SELECT id, floor(40 * power(random(), 3)),
           (SELECT array_agg((value + (random() - 0.5) * 0.8)::real ORDER BY dimension) FROM centres WHERE centre = id % 200)::vector
    FROM generate_series(1, 20000) id;
CREATE INDEX ON items USING hnsw (embedding vector_cosine_ops);
CREATE INDEX ON items (category);
ANALYZE items;

-- The learner's role: it reads the tables that are to be tuned, and nothing more.
CREATE ROLE ruvector LOGIN PASSWORD 'ruvector';
GRANT SELECT ON items TO ruvector;
