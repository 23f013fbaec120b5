/**
 * node-postgres through the proxy: every way in which `pg` and its companions speak the protocol.
 *
 * The connection comes from libpq's variables (PGHOST, PGPORT, ...).  Each test makes what it needs and
 * checks values, not only the absence of errors; run direct and proxied, the lists of passes must be equal.
 *
 *     node --test smoke.test.js
 */

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import pg from 'pg';
import { from as copyFrom, to as copyTo } from 'pg-copy-streams';
import Cursor from 'pg-cursor';
import QueryStream from 'pg-query-stream';
import pgvector from 'pgvector/pg';

const ROWS = 200;
const NEAREST = 'SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 5';

/** The three-dimensional vector of item `id`: on a line, so that neighbours are known. */
const embedding = (id) => [id, id / 2, 1];

/** Run `use` with a connection that is closed afterwards, whatever happens. */
async function withClient(use, options = {}) {
  const client = new pg.Client(options);
  await client.connect();
  try {
    return await use(client);
  } finally {
    await client.end();
  }
}

before(() =>
  withClient(async (client) => {
    await client.query('CREATE TABLE items (id int PRIMARY KEY, label text, embedding vector(3))');
    for (let id = 0; id < ROWS; id += 1) {
      await client.query('INSERT INTO items VALUES ($1, $2, $3)', [
        id,
        `item ${id}`,
        pgvector.toSql(embedding(id)),
      ]);
    }
    await client.query('CREATE INDEX ON items USING hnsw (embedding vector_l2_ops)');
    await client.query('CREATE TABLE notes (id serial, body text)');
  }),
);

describe('simple protocol', () => {
  test('one statement', () =>
    withClient(async (client) => {
      const { rows, command, rowCount } = await client.query('SELECT 1 AS one, NULL AS nothing');
      assert.deepEqual(rows, [{ one: 1, nothing: null }]);
      assert.deepEqual([command, rowCount], ['SELECT', 1]);
    }));

  test('several statements in one text, each with its own result', () =>
    withClient(async (client) => {
      const results = await client.query(
        'SELECT 1 AS a; SELECT 2 AS b UNION SELECT 3 ORDER BY 1; CREATE TEMP TABLE t (x int); SELECT 4 AS c',
      );
      assert.deepEqual(
        results.map((result) => [result.command, result.rows]),
        [
          ['SELECT', [{ a: 1 }]],
          ['SELECT', [{ b: 2 }, { b: 3 }]],
          ['CREATE', []],
          ['SELECT', [{ c: 4 }]],
        ],
      );
    }));

  test('nearest neighbours with a literal', () =>
    withClient(async (client) => {
      const { rows } = await client.query(
        "SELECT id FROM items ORDER BY embedding <-> '[50,25,1]' LIMIT 3",
      );
      assert.equal(rows[0].id, 50);
      assert.deepEqual(rows.map((row) => row.id).sort(), [49, 50, 51]);
    }));

  test('an empty text', () =>
    withClient(async (client) => {
      const { rows, command } = await client.query('');
      assert.deepEqual([rows, command], [[], null]);
    }));

  test('the position of an error behind multi-byte text', () =>
    withClient(async (client) => {
      await assert.rejects(client.query("SELECT 'größe → 大小', nonsense"), (error) => {
        assert.deepEqual([error.code, error.position], ['42703', '22']);
        return true;
      });
      assert.equal((await client.query('SELECT 1 AS one')).rows[0].one, 1);
    }));

  test('a notice comes before its result', () =>
    withClient(async (client) => {
      const notices = [];
      client.on('notice', (notice) => notices.push(notice.message));
      await client.query("DO $$ BEGIN RAISE NOTICE 'hear, hear'; END $$");
      assert.deepEqual(notices, ['hear, hear']);
    }));
});

describe('extended protocol', () => {
  test('parameters of many types, in both directions', () =>
    withClient(async (client) => {
      const values = [true, 7, 'text', new Date(0), Buffer.from([0, 255]), [1, 2], { a: [1] }, null];
      const types = ['bool', 'int8', 'text', 'timestamptz', 'bytea', 'int[]', 'jsonb', 'int'];
      const columns = types.map((type, i) => `$${i + 1}::${type} AS c${i}`).join(', ');
      const { rows } = await client.query(`SELECT ${columns}`, [...values.slice(0, 6), '{"a":[1]}', null]);
      assert.deepEqual(Object.values(rows[0]), [true, '7', ...values.slice(2)]);
    }));

  test('a named statement is parsed once and used often', () =>
    withClient(async (client) => {
      for (let id = 0; id < 12; id += 1) {
        const { rows } = await client.query({
          name: 'nearest',
          text: NEAREST,
          values: [pgvector.toSql(embedding(id * 10 + 5))],
        });
        assert.equal(rows[0].id, id * 10 + 5);
        assert.equal(rows.length, 5);
      }
      const { rows } = await client.query(
        "SELECT count(*)::int AS n FROM pg_prepared_statements WHERE name = 'nearest'",
      );
      assert.equal(rows[0].n, 1);
    }));

  test('a binary result', () =>
    withClient(async (client) => {
      const { rows } = await client.query({
        text: 'SELECT $1::int4 AS number, $2::text AS word',
        values: [1234567, 'wörd'],
        binary: true,
      });
      assert.deepEqual(rows, [{ number: 1234567, word: 'wörd' }]);
    }));

  test('rows as arrays, with the types of their columns', () =>
    withClient(async (client) => {
      const { rows, fields } = await client.query({
        text: 'SELECT id, label FROM items WHERE id < $1 ORDER BY id',
        values: [2],
        rowMode: 'array',
      });
      assert.deepEqual(rows, [[0, 'item 0'], [1, 'item 1']]);
      assert.deepEqual(fields.map((field) => [field.name, field.dataTypeID]), [['id', 23], ['label', 25]]);
    }));

  test('an error leaves the connection usable', () =>
    withClient(async (client) => {
      await assert.rejects(client.query('SELECT 1 / $1::int', [0]), { code: '22012' });
      await assert.rejects(client.query(NEAREST, ['[1,2]']), { code: '22000' });
      const { rows } = await client.query(NEAREST, ['[3,1.5,1]']);
      assert.equal(rows[0].id, 3);
    }));

  test('a megabyte as a parameter and back', () =>
    withClient(async (client) => {
      const text = 'ü0'.repeat(700_000);
      const { rows } = await client.query('SELECT $1::text AS text, length($1) AS length', [text]);
      assert.equal(rows[0].length, text.length);
      assert.ok(rows[0].text === text);
    }));

  test('queries sent without waiting are answered in order', () =>
    withClient(async (client) => {
      const asked = Array.from({ length: 50 }, (_, id) =>
        id % 2 ? client.query('SELECT $1::int AS id', [id]) : client.query(NEAREST, [pgvector.toSql(embedding(id))]),
      );
      const answers = await Promise.all(asked);
      assert.deepEqual(answers.map(({ rows }) => rows[0].id), asked.map((_, id) => id));
    }));

  test('pipelining: errors in between harm only their own query', () =>
    withClient(
      async (client) => {
        const asked = Array.from({ length: 30 }, (_, id) => client.query('SELECT 60 / $1::int AS x', [id % 5]));
        const answers = await Promise.allSettled(asked);
        for (const [id, answer] of answers.entries()) {
          if (id % 5 === 0) assert.equal(answer.reason.code, '22012');
          else assert.equal(answer.value.rows[0].x, 60 / (id % 5) | 0);
        }
      },
      { pipelining: true },
    ));
});

describe('cursors and streams', () => {
  test('a cursor reads in portions', () =>
    withClient(async (client) => {
      const cursor = client.query(new Cursor('SELECT id FROM items ORDER BY id', []));
      const first = await cursor.read(3);
      const second = await cursor.read(4);
      assert.deepEqual([...first, ...second].map((row) => row.id), [0, 1, 2, 3, 4, 5, 6]);
      await cursor.close();
      assert.equal((await client.query('SELECT 2 AS two')).rows[0].two, 2);
    }));

  test('a cursor over nearest neighbours inside a transaction', () =>
    withClient(async (client) => {
      await client.query('BEGIN');
      const cursor = client.query(new Cursor(NEAREST, ['[20,10,1]']));
      const rows = [...(await cursor.read(2)), ...(await cursor.read(2)), ...(await cursor.read(2))];
      assert.equal(rows.length, 5);
      assert.equal(rows[0].id, 20);
      await cursor.close();
      await client.query('COMMIT');
    }));

  test('a stream of rows with back-pressure', () =>
    withClient(async (client) => {
      const stream = client.query(
        new QueryStream('SELECT generate_series(1, $1) AS i', [5000], { batchSize: 100, highWaterMark: 10 }),
      );
      let sum = 0;
      for await (const { i } of stream) sum += i;
      assert.equal(sum, (5000 * 5001) / 2);
    }));

  test('a stream that is given up half-way', () =>
    withClient(async (client) => {
      const stream = client.query(new QueryStream('SELECT generate_series(1, 100000) AS i'));
      for await (const { i } of stream) if (i === 10) break;
      assert.equal((await client.query('SELECT 3 AS three')).rows[0].three, 3);
    }));
});

describe('COPY', () => {
  test('in and out again', () =>
    withClient(async (client) => {
      await client.query('CREATE TEMP TABLE copied (id int, body text)');
      const lines = Array.from({ length: 20_000 }, (_, id) => `${id}\tline ${id} ö\n`);
      await pipeline(Readable.from(lines), client.query(copyFrom('COPY copied FROM STDIN')));
      const read = [];
      for await (const chunk of client.query(copyTo('COPY copied TO STDOUT'))) read.push(chunk);
      assert.ok(Buffer.concat(read).toString() === lines.join(''));
    }));

  test('bad data fails, and the connection goes on', () =>
    withClient(async (client) => {
      await client.query('CREATE TEMP TABLE copied (id int)');
      const bad = pipeline(Readable.from(['1\n', 'two\n']), client.query(copyFrom('COPY copied FROM STDIN')));
      await assert.rejects(bad, { code: '22P02' });
      assert.equal((await client.query('SELECT count(*)::int AS n FROM copied')).rows[0].n, 0);
    }));

  test('the client gives up', () =>
    withClient(async (client) => {
      await client.query('CREATE TEMP TABLE copied (id int)');
      const stream = client.query(copyFrom('COPY copied FROM STDIN'));
      stream.write('1\n');
      stream.destroy(new Error('changed my mind'));
      const [error] = await once(stream, 'error');
      assert.equal(error.code, '57014');
      assert.equal((await client.query('SELECT count(*)::int AS n FROM copied')).rows[0].n, 0);
    }));
});

describe('transactions', () => {
  test('commit, roll back, savepoints, nearest neighbours between', () =>
    withClient(async (client) => {
      const nearest = async () => (await client.query(NEAREST, ['[7,3.5,1]'])).rows[0].id;
      await client.query('BEGIN ISOLATION LEVEL REPEATABLE READ');
      assert.equal(await nearest(), 7);
      await client.query("INSERT INTO notes (body) VALUES ('kept')");
      await client.query('SAVEPOINT s');
      await assert.rejects(client.query('SELECT no_such_column'), { code: '42703' });
      await assert.rejects(nearest(), { code: '25P02' });
      await client.query('ROLLBACK TO s');
      assert.equal(await nearest(), 7);
      await client.query('COMMIT');
      await client.query('BEGIN');
      await client.query("INSERT INTO notes (body) VALUES ('lost')");
      assert.equal(await nearest(), 7);
      await client.query('ROLLBACK');
      const { rows } = await client.query('SELECT body FROM notes');
      assert.deepEqual(rows, [{ body: 'kept' }]);
    }));

  test('a setting of the application wins', () =>
    withClient(async (client) => {
      const shown = async () => (await client.query('SHOW hnsw.ef_search')).rows[0]['hnsw.ef_search'];
      await client.query('SET hnsw.ef_search = 123');
      await client.query(NEAREST, ['[1,0.5,1]']);
      assert.equal(await shown(), '123');
      await client.query('BEGIN');
      await client.query('SET LOCAL hnsw.ef_search = 55');
      await client.query(NEAREST, ['[1,0.5,1]']);
      assert.equal(await shown(), '55');
      await client.query('COMMIT');
      assert.equal(await shown(), '123');
    }));

  test('no setting of the proxy is left behind', () =>
    withClient(async (client) => {
      await client.query('BEGIN');
      await client.query(NEAREST, ['[1,0.5,1]']);
      assert.equal((await client.query('SHOW hnsw.ef_search')).rows[0]['hnsw.ef_search'], '40');
      assert.equal((await client.query('SHOW work_mem')).rows[0].work_mem, '4MB');
      await client.query('COMMIT');
      await client.query(NEAREST, ['[1,0.5,1]']);
      assert.equal((await client.query('SHOW hnsw.ef_search')).rows[0]['hnsw.ef_search'], '40');
    }));
});

describe('sessions', () => {
  test('notifications reach a session that is idle', () =>
    withClient(async (listener) => {
      await listener.query('LISTEN news');
      const heard = once(listener, 'notification');
      await withClient((speaker) => speaker.query("SELECT pg_notify('news', 'extra!')"));
      const [{ channel, payload }] = await heard;
      assert.deepEqual([channel, payload], ['news', 'extra!']);
    }));

  test('a cancel request ends the statement of its session, once', () =>
    withClient(async (client) => {
      const slow = client.query('SELECT pg_sleep(30)');
      slow.catch(() => {});
      await sleep(200);
      const canceller = new pg.Client();
      canceller.connection.once('connect', () =>
        canceller.connection.cancel(client.processID, client.secretKey),
      );
      canceller.connection.connect(client.port, client.host);
      await assert.rejects(slow, { code: '57014' });
      assert.equal((await client.query('SELECT 4 AS four')).rows[0].four, 4);
    }));

  test('a statement timeout is the statement\'s own error', () =>
    withClient(
      async (client) => {
        await assert.rejects(client.query('SELECT pg_sleep(10)'), { code: '57014' });
        assert.equal((await client.query(NEAREST, ['[9,4.5,1]'])).rows[0].id, 9);
      },
      { statement_timeout: 200 },
    ));

  test('a session that the server ends', () =>
    withClient(async (killer) => {
      const victim = new pg.Client();
      await victim.connect();
      const failed = once(victim, 'error');
      await killer.query('SELECT pg_terminate_backend($1)', [victim.processID]);
      const [error] = await failed;
      assert.equal(error.code, '57P01');
      await victim.end();
    }));

  test('a pool under load', async () => {
    const pool = new pg.Pool({ max: 8 });
    try {
      const asked = Array.from({ length: 300 }, (_, i) =>
        pool.query(NEAREST, [pgvector.toSql(embedding(i % ROWS))]),
      );
      const answers = await Promise.all(asked);
      assert.deepEqual(answers.map(({ rows }) => rows[0].id), asked.map((_, i) => i % ROWS));
    } finally {
      await pool.end();
    }
  });

  test('a database that does not exist', async () => {
    await assert.rejects(withClient(() => {}, { database: 'no_such_database' }), { code: '3D000' });
  });
});

describe('pgvector', () => {
  test('vectors come back as arrays', () =>
    withClient(async (client) => {
      await pgvector.registerTypes(client);
      const { rows } = await client.query('SELECT embedding FROM items WHERE id = $1', [4]);
      assert.deepEqual(rows[0].embedding, [4, 2, 1]);
    }));
});

after(() => withClient((client) => client.query('DROP TABLE items, notes')));
