import java.nio.charset.StandardCharsets;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;

/** Runs the texts on standard input, each twice prepared; prints "ok" or the SQLSTATE of each. */
public class Statements {
    public static void main(String[] arguments) throws Exception {
        String input = new String(System.in.readAllBytes(), StandardCharsets.UTF_8);
        try (Connection connection = DriverManager.getConnection(arguments[0])) {
            for (String text : input.split("\n---\n")) {
                try (PreparedStatement statement = connection.prepareStatement(text)) {
                    if (statement.execute()) {
                        try (ResultSet rows = statement.getResultSet()) {
                            int columns = rows.getMetaData().getColumnCount();
                            while (rows.next()) {
                                for (int column = 1; column <= columns; column++) {
                                    rows.getString(column);
                                }
                            }
                        }
                    }
                    System.out.println("ok");
                } catch (SQLException error) {
                    System.out.println(error.getSQLState());
                }
            }
        }
    }
}
