import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.nio.charset.StandardCharsets;
import java.sql.BatchUpdateException;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Objects;
import java.util.Properties;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;

/**
 * pgjdbc through the proxy: every way in which the driver speaks the protocol.
 *
 * <p>Run as a single source file: {@code java -cp postgresql.jar Smoke.java jdbc:postgresql://...}. Each test
 * has a connection of its own with the properties that it asks for. The outcome is one line per test, {@code
 * ok NAME} or {@code not ok NAME: reason}; the process ends with 0 in either case.
 */
public final class Smoke {
  private static final int ROWS = 200;
  private static final String NEAREST =
      "SELECT id FROM items ORDER BY embedding <-> CAST(? AS vector) LIMIT 5";

  /** A test's body. */
  private interface Body {
    void run(Connection connection) throws Exception;
  }

  private final String url;

  private Smoke(String url) {
    this.url = url;
  }

  public static void main(String[] arguments) throws Exception {
    Smoke smoke = new Smoke(arguments[0]);
    smoke.prepare();
    smoke.queries();
    smoke.portions();
    smoke.batches();
    smoke.copies();
    smoke.transactions();
    smoke.sessions();
  }

  // -- what is tested --------------------------------------------------------------------------------

  private void prepare() throws Exception {
    try (Connection connection = connect();
        Statement statement = connection.createStatement()) {
      statement.execute("CREATE TABLE items (id int PRIMARY KEY, label text, embedding vector(3))");
      statement.execute(
          "INSERT INTO items SELECT i, 'item ' || i, ARRAY[i, i / 2.0, 1]::vector FROM generate_series(0, "
              + (ROWS - 1)
              + ") i");
      statement.execute("CREATE INDEX ON items USING hnsw (embedding vector_l2_ops)");
      statement.execute("CREATE TABLE notes (id serial PRIMARY KEY, body text UNIQUE)");
    }
  }

  private void queries() {
    for (String mode : new String[] {"extended", "extendedForPrepared", "extendedCacheEverything", "simple"}) {
      test(
          "nearest neighbours, preferQueryMode=" + mode,
          connection -> {
            for (int i = 0; i < 20; i++) {
              same(9 * i, nearest(connection, 9 * i));
            }
          },
          "preferQueryMode",
          mode);
      test(
          "several statements in one text, preferQueryMode=" + mode,
          connection -> {
            try (Statement statement = connection.createStatement()) {
              same(true, statement.execute("SELECT 1; CREATE TEMP TABLE t (x int); SELECT 2, 3"));
              same(List.of(List.of("1")), rows(statement.getResultSet()));
              same(false, statement.getMoreResults());
              same(0, statement.getUpdateCount());
              same(true, statement.getMoreResults());
              same(List.of(List.of("2", "3")), rows(statement.getResultSet()));
            }
          },
          "preferQueryMode",
          mode);
      test(
          "an error leaves the connection usable, preferQueryMode=" + mode,
          connection -> {
            fails("22012", () -> one(connection, "SELECT 1 / ?", 0));
            fails("42703", () -> one(connection, "SELECT 'größe', nonsense WHERE 1 = ?", 1));
            same(7, nearest(connection, 7));
          },
          "preferQueryMode",
          mode);
    }
    for (String threshold : new String[] {"-1", "0", "1", "5"}) {
      test(
          "prepareThreshold=" + threshold,
          connection -> {
            try (PreparedStatement statement = connection.prepareStatement(NEAREST)) {
              for (int i = 0; i < 12; i++) {
                statement.setString(1, embedding(i));
                same(i, Integer.parseInt(rows(statement.executeQuery()).get(0).get(0)));
              }
            }
          },
          "prepareThreshold",
          threshold);
    }
    for (String binary : new String[] {"true", "false"}) {
      test(
          "values of many types, binaryTransfer=" + binary,
          connection -> {
            String sql = "SELECT ?::int2, ?::int4, ?::int8, ?::float8, ?::numeric, ?::text, encode(?::bytea, 'hex'), ?::uuid, ?::date";
            for (int i = 0; i < 8; i++) {
              try (PreparedStatement statement = connection.prepareStatement(sql)) {
                statement.setInt(1, 1);
                statement.setInt(2, -2);
                statement.setLong(3, 1L << 60);
                statement.setDouble(4, 0.1);
                statement.setBigDecimal(5, new java.math.BigDecimal("123456789.0123456789"));
                statement.setString(6, "größe 大小");
                statement.setBytes(7, new byte[] {0, 1, (byte) 255});
                statement.setObject(8, java.util.UUID.fromString("00112233-4455-6677-8899-aabbccddeeff"));
                statement.setObject(9, java.time.LocalDate.of(1999, 12, 31));
                same(
                    "1|-2|1152921504606846976|0.1|123456789.0123456789|größe 大小|0001ff"
                        + "|00112233-4455-6677-8899-aabbccddeeff|1999-12-31",
                    String.join("|", rows(statement.executeQuery()).get(0)));
              }
            }
          },
          "binaryTransfer",
          binary,
          "prepareThreshold",
          "1");
    }
    test(
        "a megabyte as a parameter and back",
        connection -> {
          String text = "ü0".repeat(700_000);
          same(true, text.equals(one(connection, "SELECT ?", text)));
        });
    test(
        "metadata of tables and of a prepared statement",
        connection -> {
          try (ResultSet columns = connection.getMetaData().getColumns(null, "public", "items", "%")) {
            List<String> names = new ArrayList<>();
            while (columns.next()) {
              names.add(columns.getString("COLUMN_NAME") + " " + columns.getString("TYPE_NAME"));
            }
            same(List.of("id int4", "label text", "embedding vector"), names);
          }
          try (PreparedStatement statement = connection.prepareStatement("SELECT id, label FROM items WHERE id < ?")) {
            same(1, statement.getParameterMetaData().getParameterCount());
            same("label", statement.getMetaData().getColumnName(2));
          }
        });
    test(
        "generated keys",
        connection -> {
          String sql = "INSERT INTO notes (body) VALUES ('keyed')";
          try (Statement statement = connection.createStatement()) {
            statement.executeUpdate(sql, Statement.RETURN_GENERATED_KEYS);
            try (ResultSet keys = statement.getGeneratedKeys()) {
              same(true, keys.next());
              same("keyed", one(connection, "SELECT body FROM notes WHERE id = ?", keys.getInt(1)));
            }
          }
        });
  }

  private void portions() {
    for (int size : new int[] {1, 7, 1000}) {
      test(
          "a cursor with fetchSize=" + size,
          connection -> {
            connection.setAutoCommit(false);
            try (Statement statement = connection.createStatement()) {
              statement.setFetchSize(size);
              same(ROWS, rows(statement.executeQuery("SELECT id, label FROM items ORDER BY id")).size());
            }
            try (PreparedStatement statement = connection.prepareStatement(NEAREST)) {
              statement.setFetchSize(size);
              statement.setString(1, embedding(33));
              List<List<String>> found = rows(statement.executeQuery());
              same(5, found.size());
              same("33", found.get(0).get(0));
            }
            connection.commit();
          });
    }
    test(
        "two cursors read in turn, and a search between",
        connection -> {
          connection.setAutoCommit(false);
          try (Statement first = connection.createStatement();
              Statement second = connection.createStatement()) {
            first.setFetchSize(3);
            second.setFetchSize(4);
            ResultSet up = first.executeQuery("SELECT id FROM items ORDER BY id");
            ResultSet down = second.executeQuery("SELECT id FROM items ORDER BY id DESC");
            for (int i = 0; i < 50; i++) {
              same(true, up.next() && down.next());
              same(i, up.getInt(1));
              same(ROWS - 1 - i, down.getInt(1));
              if (i % 10 == 0) {
                same(i, nearest(connection, i));
              }
            }
          }
          connection.rollback();
        });
    test(
        "maxRows",
        connection -> {
          try (Statement statement = connection.createStatement()) {
            statement.setMaxRows(3);
            same(3, rows(statement.executeQuery("SELECT id FROM items")).size());
            same(3, rows(statement.executeQuery("SELECT id FROM items ORDER BY embedding <-> '[1,1,1]' LIMIT 9")).size());
          }
        });
  }

  private void batches() {
    for (String rewrite : new String[] {"false", "true"}) {
      test(
          "a batch of inserts, reWriteBatchedInserts=" + rewrite,
          connection -> {
            try (Statement statement = connection.createStatement()) {
              statement.execute("CREATE TEMP TABLE t (id int, body text)");
            }
            try (PreparedStatement statement = connection.prepareStatement("INSERT INTO t VALUES (?, ?)")) {
              for (int i = 0; i < 1500; i++) {
                statement.setInt(1, i);
                statement.setString(2, "body " + i);
                statement.addBatch();
              }
              same(1500, statement.executeBatch().length);
            }
            same("1500", one(connection, "SELECT count(*) FROM t WHERE id >= ?", 0));
          },
          "reWriteBatchedInserts",
          rewrite);
    }
    test(
        "a batch that fails in the middle",
        connection -> {
          connection.setAutoCommit(false);
          try (PreparedStatement statement = connection.prepareStatement("INSERT INTO notes (body) VALUES (?)")) {
            for (String body : new String[] {"a", "b", "a", "c"}) {
              statement.setString(1, body);
              statement.addBatch();
            }
            try {
              statement.executeBatch();
              throw new AssertionError("it did not fail");
            } catch (BatchUpdateException error) {
              same("23505", error.getSQLState());
              same(4, error.getUpdateCounts().length);
            }
          }
          connection.rollback();
          same(12, nearest(connection, 12));
        });
    test(
        "a batch of different statements",
        connection -> {
          try (Statement statement = connection.createStatement()) {
            statement.addBatch("CREATE TEMP TABLE u (x int)");
            statement.addBatch("INSERT INTO u VALUES (1), (2)");
            statement.addBatch("UPDATE u SET x = x + 1");
            statement.addBatch("DELETE FROM u WHERE x = 3");
            same("[0, 2, 2, 1]", Arrays.toString(statement.executeBatch()));
          }
        });
  }

  private void copies() {
    test(
        "COPY in and out again",
        connection -> {
          var copy = connection.unwrap(PGConnection.class).getCopyAPI();
          StringBuilder lines = new StringBuilder();
          for (int i = 0; i < 20_000; i++) {
            lines.append(i).append("\tline ").append(i).append(" ö\n");
          }
          byte[] sent = lines.toString().getBytes(StandardCharsets.UTF_8);
          try (Statement statement = connection.createStatement()) {
            statement.execute("CREATE TEMP TABLE copied (id int, body text)");
          }
          same(20_000L, copy.copyIn("COPY copied FROM STDIN", new ByteArrayInputStream(sent)));
          ByteArrayOutputStream received = new ByteArrayOutputStream();
          same(20_000L, copy.copyOut("COPY copied TO STDOUT", received));
          same(true, Arrays.equals(sent, received.toByteArray()));
        });
    test(
        "COPY that fails, COPY that is given up",
        connection -> {
          var copy = connection.unwrap(PGConnection.class).getCopyAPI();
          try (Statement statement = connection.createStatement()) {
            statement.execute("CREATE TEMP TABLE copied (id int)");
          }
          byte[] bad = "1\ntwo\n".getBytes(StandardCharsets.UTF_8);
          fails("22P02", () -> copy.copyIn("COPY copied FROM STDIN", new ByteArrayInputStream(bad)));
          var under = copy.copyIn("COPY copied FROM STDIN");
          under.writeToCopy("5\n".getBytes(StandardCharsets.UTF_8), 0, 2);
          under.cancelCopy();
          same("0", one(connection, "SELECT count(*) FROM copied WHERE id > ?", 0));
        });
  }

  private void transactions() {
    test(
        "commit, roll back, savepoints, searches between",
        connection -> {
          connection.setAutoCommit(false);
          connection.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
          same(3, nearest(connection, 3));
          Savepoint savepoint = connection.setSavepoint("s");
          fails("42703", () -> one(connection, "SELECT no_such_column WHERE 1 = ?", 1));
          fails("25P02", () -> nearest(connection, 3));
          connection.rollback(savepoint);
          same(4, nearest(connection, 4));
          connection.commit();
          same(5, nearest(connection, 5));
          connection.rollback();
        });
    for (String autosave : new String[] {"always", "conservative"}) {
      test(
          "autosave=" + autosave,
          connection -> {
            connection.setAutoCommit(false);
            for (int i = 0; i < 8; i++) {
              same(i, nearest(connection, i));
              fails("22012", () -> one(connection, "SELECT 1 / ?", 0));
              if (autosave.equals("conservative")) {
                connection.rollback();
              }
            }
            connection.commit();
          },
          "autosave",
          autosave);
    }
    test(
        "a table that changes under a prepared statement",
        connection -> {
          connection.setAutoCommit(false);
          try (Statement statement = connection.createStatement()) {
            statement.execute("CREATE TEMP TABLE shifting (x int)");
            for (int i = 0; i < 7; i++) {
              one(connection, "SELECT * FROM shifting WHERE 1 = ?", 1);
            }
            statement.execute("ALTER TABLE shifting ADD COLUMN y int");
            statement.execute("INSERT INTO shifting VALUES (1, 2)");
          }
          same("1", one(connection, "SELECT * FROM shifting WHERE 1 = ?", 1));
          connection.commit();
        },
        "autosave",
        "always");
    test(
        "a setting of the application wins, none of the proxy's is left",
        connection -> {
          connection.setAutoCommit(false);
          try (Statement statement = connection.createStatement()) {
            same(1, nearest(connection, 1));
            same(List.of(List.of("40")), rows(statement.executeQuery("SHOW hnsw.ef_search")));
            same(List.of(List.of("4MB")), rows(statement.executeQuery("SHOW work_mem")));
            statement.execute("SET LOCAL hnsw.ef_search = 55");
            same(1, nearest(connection, 1));
            same(List.of(List.of("55")), rows(statement.executeQuery("SHOW hnsw.ef_search")));
          }
          connection.commit();
        });
    test(
        "DISCARD ALL and DEALLOCATE ALL under the driver's feet",
        connection -> {
          for (String sql : new String[] {"DEALLOCATE ALL", "DISCARD ALL"}) {
            for (int i = 0; i < 8; i++) {
              same(i, nearest(connection, i));
            }
            try (Statement statement = connection.createStatement()) {
              statement.execute(sql);
            }
            same(2, nearest(connection, 2));
          }
        });
  }

  private void sessions() {
    test(
        "notifications",
        connection -> {
          try (Statement statement = connection.createStatement();
              Connection other = connect();
              Statement speaker = other.createStatement()) {
            statement.execute("LISTEN news");
            speaker.execute("NOTIFY news, 'extra'");
            PGNotification[] heard = connection.unwrap(PGConnection.class).getNotifications(5000);
            same("news extra", heard[0].getName() + " " + heard[0].getParameter());
          }
        });
    test(
        "a cancelled statement",
        connection -> {
          ScheduledExecutorService timer = Executors.newSingleThreadScheduledExecutor();
          try (Statement statement = connection.createStatement()) {
            timer.schedule(
                () -> {
                  statement.cancel();
                  return null;
                },
                200,
                TimeUnit.MILLISECONDS);
            fails("57014", () -> statement.executeQuery("SELECT pg_sleep(30)"));
          } finally {
            timer.shutdown();
          }
          same(6, nearest(connection, 6));
        });
    test(
        "a query timeout",
        connection -> {
          try (Statement statement = connection.createStatement()) {
            statement.setQueryTimeout(1);
            fails("57014", () -> statement.executeQuery("SELECT pg_sleep(30)"));
          }
          same(6, nearest(connection, 6));
        });
    test(
        "a session that the server ends",
        connection -> {
          String pid = String.valueOf(connection.unwrap(PGConnection.class).getBackendPID());
          try (Connection other = connect()) {
            one(other, "SELECT pg_terminate_backend(?)", Integer.parseInt(pid));
          }
          fails("57P01", () -> one(connection, "SELECT ?", 1));
        });
    test(
        "a connection that is read-only",
        connection -> {
          connection.setReadOnly(true);
          connection.setAutoCommit(false);
          same(8, nearest(connection, 8));
          fails("25006", () -> connection.createStatement().execute("INSERT INTO notes (body) VALUES ('x')"));
          connection.rollback();
        });
    test(
        "start-up parameters",
        connection -> {
          same("smoke", one(connection, "SELECT current_setting('application_name') WHERE 1 = ?", 1));
          same("99", one(connection, "SELECT current_setting('hnsw.ef_search') WHERE 1 = ?", 1));
        },
        "ApplicationName",
        "smoke",
        "options",
        "-c hnsw.ef_search=99");
  }

  // -- how it is tested ------------------------------------------------------------------------------

  private Connection connect(String... properties) throws SQLException {
    Properties all = new Properties();
    for (int i = 0; i < properties.length; i += 2) {
      all.setProperty(properties[i], properties[i + 1]);
    }
    return DriverManager.getConnection(url, all);
  }

  private void test(String name, Body body, String... properties) {
    try (Connection connection = connect(properties)) {
      body.run(connection);
      System.out.println("ok " + name);
    } catch (Exception | AssertionError error) {
      System.out.println("not ok " + name + ": " + error);
    }
  }

  private static String embedding(int id) {
    return "[" + id + "," + id / 2.0 + ",1]";
  }

  private static int nearest(Connection connection, int id) throws SQLException {
    return Integer.parseInt(one(connection, NEAREST, embedding(id)));
  }

  /** The first column of the first row, null if there is none. */
  private static String one(Connection connection, String sql, Object argument) throws SQLException {
    try (PreparedStatement statement = connection.prepareStatement(sql)) {
      statement.setObject(1, argument);
      List<List<String>> found = rows(statement.executeQuery());
      return found.isEmpty() ? null : found.get(0).get(0);
    }
  }

  private static List<List<String>> rows(ResultSet results) throws SQLException {
    List<List<String>> rows = new ArrayList<>();
    int width = results.getMetaData().getColumnCount();
    while (results.next()) {
      List<String> row = new ArrayList<>();
      for (int i = 1; i <= width; i++) {
        row.add(results.getString(i));
      }
      rows.add(row);
    }
    return rows;
  }

  private static void same(Object expected, Object found) {
    if (!Objects.equals(expected, found)) {
      throw new AssertionError("expected " + expected + ", found " + found);
    }
  }

  /** An action that talks to the server. */
  private interface Action {
    void run() throws Exception;
  }

  private static void fails(String state, Action action) throws Exception {
    try {
      action.run();
    } catch (SQLException error) {
      same(state, error.getSQLState());
      return;
    }
    throw new AssertionError("it did not fail with " + state);
  }
}
