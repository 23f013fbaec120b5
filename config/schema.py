"""Every option of ruvector-proxy: its type, default, unit, range and downside.

This file is the one place where an option is declared.  The loader, the environment variables, the reference
in `docs/configuration.md`, the sample file and the tests are all derived from it: an option that is not
described here does not exist, and one that is described here can be set in every way.

Rules
-----
- A `Config` is immutable and complete: whoever holds one never asks whether a value was given.
- Values from a file are taken strictly (``port = "6432"`` is an error); the loader converts what comes
  from the environment first.
- A secret never appears in ``repr``, ``str``, a log line or ordinary serialisation.  Only `Config.to_json`
  contains it: that is what a parent process writes to the standard input of its children.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field

from config.dsn import redact_dsn
from config.section import Dsn, Secret, Section, option

OptimizeFor = Literal["recall", "latency", "balanced"]
TLSMode = Literal["disable", "allow", "require", "verify-ca", "verify-full"]
SSLMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]

SYSTEM = Path("system")
"""As `upstream.sslrootcert`: no file, but the certificates that the operating system trusts."""

AUTH_QUERY = (
    "SELECT a.rolname, a.rolpassword FROM pg_catalog.pg_authid AS a WHERE a.rolname OPERATOR(pg_catalog.=) "
    "$1::pg_catalog.name AND a.rolcanlogin AND (a.rolvaliduntil IS NULL OR a.rolvaliduntil "
    "OPERATOR(pg_catalog.>) pg_catalog.now())"
)
"""Only who could log in at the server: not after VALID UNTIL, not without LOGIN; names with their schema."""


class Listen(Section):
    """Where applications connect."""

    host: str = option(
        "127.0.0.1",
        'Address on which clients are accepted; "0.0.0.0" or "::" accepts from everywhere.',
        downside=(
            "An address that others can reach exposes the traffic, unless listen.tls_mode demands encryption."
        ),
        min_length=1,
    )
    port: int = option(
        6432,
        "TCP port on which clients are accepted; 0 takes any free port and names it in the log.",
        downside="Applications must be pointed at the same port.",
        ge=0,
        le=65535,
    )
    tls_mode: TLSMode | None = option(
        None,
        'Whether clients come with TLS: "disable" declines it, "allow" leaves it to the client, "require" '
        'refuses a client without, "verify-ca" also one without a certificate that tls_ca has signed, and '
        '"verify-full" one whose certificate is not in the name of the user. Left out: "allow" where '
        'tls_cert is set, else "disable". Over a unix socket there is no TLS, and none is asked for.',
        downside=(
            '"allow" encrypts only for clients that ask; the stricter refuse those that do not (docs/tls.md).'
        ),
    )
    tls_cert: Path | None = option(
        None,
        "File with the certificate that clients are shown, in PEM format, intermediate ones behind it. "
        "It is read again when it has changed, as are tls_key and tls_ca.",
        downside="It runs out one day; replace it before, no connection is lost by that.",
        strict=False,
    )
    tls_key: Path | None = option(
        None,
        "File with the private key of tls_cert, without a passphrase; left out: it is in tls_cert.",
        downside="Whoever reads it can pretend to be this proxy.",
        strict=False,
    )
    tls_ca: Path | None = option(
        None,
        'File with the certificates of those who sign clients\' certificates, for tls_mode "verify-ca" and '
        '"verify-full".',
        downside="Everybody with a certificate signed by one of them is let past this check.",
        strict=False,
    )
    tls_min_version: Literal["1.2", "1.3"] = option(
        "1.2",
        "Oldest version of TLS that clients may use.",
        downside='"1.3" locks out clients with an OpenSSL older than 1.1.1 or an old Java.',
    )
    unix_socket: Path | None = option(
        None,
        "Directory in which clients are accepted on a unix socket as well; the socket is called "
        ".s.PGSQL.<port>, after listen.port.",
        downside=(
            "The directory must exist and be writable, and no PostgreSQL server may use the same port in it."
        ),
        strict=False,
    )
    unix_socket_mode: str = option(
        "0777",
        "Rights of the unix socket, in octal digits; who may write may connect.",
        downside='"0777" lets every user of the machine connect; who logs in is still for the server to say.',
        pattern="^0?[0-7]{3}$",
    )

    @property
    def effective_tls_mode(self) -> TLSMode:
        """The mode, with its default resolved."""
        return self.tls_mode or ("disable" if self.tls_cert is None else "allow")

    @property
    def requires_tls(self) -> bool:
        """Whether a client has to come with TLS, unless over a unix socket."""
        return self.effective_tls_mode in ("require", "verify-ca", "verify-full")

    @property
    def checks_client_certificates(self) -> bool:
        """Whether a client needs a certificate."""
        return self.effective_tls_mode in ("verify-ca", "verify-full")

    @property
    def socket_path(self) -> Path | None:
        """The unix socket; None without one."""
        return self.unix_socket / f".s.PGSQL.{self.port}" if self.unix_socket else None


class Upstream(Section):
    """The PostgreSQL server that answers."""

    host: str = option(
        "127.0.0.1",
        "Name or address of the server, or the directory of its unix socket (beginning with a slash).",
        downside="A name is looked up for every new connection, so a slow resolver slows connecting.",
        min_length=1,
    )
    port: int = option(
        5432,
        "Port of the server; with a socket directory, the number at the end of the socket's name.",
        downside="None; it has to be the server's.",
        ge=1,
        le=65535,
    )
    sslmode: SSLMode | None = option(
        None,
        "Whether the server is reached with TLS, in the words of libpq, which mean the same as there. "
        'Left out: "prefer", over a unix socket "disable", and with sslrootcert = "system" "verify-full".',
        downside=(
            'Up to "require" nobody makes sure that it is the right server, unless sslrootcert is set; '
            '"prefer" and "allow" may go on without encryption. Encryption costs both sides some time.'
        ),
    )
    sslrootcert: Path | None = option(
        None,
        "File with the certificates that the server's is checked by; "
        '"system" means those that the operating system trusts. With a file "require" checks as '
        '"verify-ca" does, as in libpq. It is read again when it has changed, as are sslcert and sslkey.',
        downside='"system" trusts hundreds of authorities, so it demands "verify-full".',
        strict=False,
    )
    sslcert: Path | None = option(
        None,
        "File with a certificate of the proxy's own, for a server that asks for one.",
        downside=(
            "It is one for all clients: a server that takes the user's name from it (clientcert=verify-full, "
            "method cert) sees the same name from all."
        ),
        strict=False,
    )
    sslkey: Path | None = option(
        None,
        "File with the private key of sslcert, without a passphrase; left out: it is in sslcert.",
        downside="Whoever reads it can pretend to be this proxy.",
        strict=False,
    )
    sslnegotiation: Literal["postgres", "direct"] = option(
        "postgres",
        'How TLS begins: "postgres" asks first, "direct" begins at once, which saves a round trip and needs '
        "PostgreSQL 17.",
        downside='An older server closes the connection; "direct" needs sslmode "require" or stronger.',
    )

    @property
    def effective_sslmode(self) -> SSLMode:
        """The mode, with its default resolved; a unix socket is never encrypted."""
        if self.socket_path is not None:
            return "disable"
        return self.sslmode or ("verify-full" if self.sslrootcert == SYSTEM else "prefer")

    @property
    def socket_path(self) -> Path | None:
        """The server's unix socket, or None where it is reached over TCP."""
        return Path(self.host) / f".s.PGSQL.{self.port}" if self.host.startswith("/") else None

    @property
    def address(self) -> str:
        """The address for people: ``host:port`` or the path of the socket."""
        return str(self.socket_path or host_port(self.host, self.port))


class Admin(Section):
    """The HTTP server for metrics, health checks and the dashboard; it changes nothing."""

    host: str = option(
        "127.0.0.1",
        "Address of the HTTP server for the dashboard, /metrics, /healthz and /readyz.",
        downside=(
            "Without admin.token an address that others can reach shows them table names, statements,"
            " filter values and traffic figures."
        ),
        min_length=1,
    )
    port: int = option(
        9464,
        "Port of the HTTP server; 0 takes any free port and names it in the log.",
        downside="Each proxy on one machine needs its own.",
        ge=0,
        le=65535,
    )
    token: Secret | None = option(
        None,
        "What a request has to present (Authorization: Bearer ...) for the dashboard's data and /metrics; "
        "/healthz and /readyz stay open for probes.",
        unit="16 characters or more",
        downside="Prometheus has to be given it as well; HTTP carries it in clear.",
    )
    names: str = option(
        "",
        "Host names, separated by commas, by which the server may be addressed, besides IP addresses, "
        "localhost and admin.host.",
        downside=(
            "Without this check any web page could read the admin port through a name that it points "
            "there (DNS rebinding): name only what you use."
        ),
    )


class Workers(Section):
    """The processes that carry the traffic."""

    count: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = option(
        1,
        'Number of worker processes; "auto" takes one per CPU that this process may use.',
        downside="Each may use a core and takes 60 MB or more; connections are spread, not balanced by load.",
    )

    @property
    def resolved(self) -> int:
        """The number of processes, with "auto" resolved for this machine."""
        if self.count != "auto":
            return self.count
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1


class Learner(Section):
    """The background process that measures recall and latency."""

    dsn: Dsn | None = option(
        None,
        "Connection URI for exact searches and EXPLAIN on the side, e.g. "
        "postgresql://user:password@host:5432/db. Its role needs SELECT on the tables to be tuned. Without "
        "it the learner is off: queries are relayed and counted, and run as they came.",
        downside=(
            "The role reads the tables, so treat the URI as a secret; set RUVECTOR_LEARNER_DSN to keep it "
            "out of the file."
        ),
    )
    replica_dsn: Dsn | None = option(
        None,
        "Connection URI of a streaming replica on which queries are measured instead; while it cannot be "
        "reached, the server of learner.dsn is used. The database in it is replaced by the one measured.",
        downside=(
            "Costs are those of the replica's machine: it should be like the primary's. What it has not "
            "replayed yet is not seen."
        ),
    )
    budget: float = option(
        0.02,
        "Share of the time of one database connection that measuring may use, in the long run.",
        unit="share, 0 to 1",
        downside=(
            "More learns faster and loads the server more; 0 stops measuring once the starting credit is "
            "spent."
        ),
        ge=0.0,
        le=1.0,
        live=True,
    )
    starting_credit: float = option(
        60.0,
        "Database time that may be spent at once after a start, before the budget limits it, so that a new"
        " table is tuned in minutes. Half of it is granted again when a table or its index changes.",
        unit="seconds",
        downside=(
            "One more busy connection for about that long after the first queries; 0 makes the first "
            "results slow to come."
        ),
        ge=0.0,
    )

    batch: int = option(
        8,
        "Queries whose exact neighbours are found in one pass over the table, where an exact search takes "
        "200 ms or more.",
        unit="queries",
        downside="More saves database time, in one statement that runs longer; 1 searches for each alone.",
        ge=1,
        le=64,
        live=True,
    )
    exact_rows: int = option(
        5_000_000,
        "Rows of a table up to which recall is measured against all of them; of a larger table a random "
        "sample of about so many rows is searched.",
        unit="rows",
        downside=(
            "Fewer makes measuring cheaper and each measurement vaguer: it takes the more of them; more may "
            "run into the 30 s that a statement of the learner gets."
        ),
        ge=10_000,
        live=True,
    )

    @property
    def redacted_dsn(self) -> str | None:
        """The URI for people, without its password."""
        return redact_dsn(self.dsn.get_secret_value()) if self.dsn else None


class Store(Section):
    """Where what was learned is kept."""

    kind: Literal["sqlite", "postgres"] = option(
        "sqlite",
        'Kind of store: "sqlite" is a file in the state directory; "postgres" is a schema in a database that '
        "all replicas of the proxy share, beside a file of each replica's own (docs/replicas.md).",
        downside=(
            'With "sqlite" only one proxy may use a state directory; "postgres" needs store.dsn, and '
            "takes one connection of each replica."
        ),
    )
    path: Path = option(
        Path("state"),
        "State directory; it is created where missing. A relative path starts at the configuration file's "
        "directory, without a file at the working directory.",
        downside="Losing it means measuring again; it holds query vectors and values unless anonymize is on.",
        strict=False,
    )
    dsn: Dsn | None = option(
        None,
        'Connection URI of the shared store, for kind = "postgres". Its role needs CREATE on the database at '
        "the first start; else the log shows the statements that somebody has to run.",
        downside=(
            "The role reads what was learned, with query vectors and values, so treat the URI as a secret; "
            "set RUVECTOR_STORE_DSN to keep it out of the file."
        ),
    )
    db_schema: str = option(
        "ruvector_proxy",
        "Schema of the shared store, in lower case.",
        downside="Proxies with another schema share nothing with these.",
        pattern="^[a-z_][a-z0-9_]{0,47}$",
    )
    group: str = option(
        "default",
        "Name of the replicas that learn together. They have the same upstream and the same configuration.",
        downside="Replicas of another upstream in the same group would get policies that are not about it.",
        min_length=1,
        max_length=100,
    )
    max_age: float = option(
        7_776_000.0,
        "Age after which measured queries are deleted from the store.",
        unit="seconds",
        downside="Short forgets what is asked seldom; long keeps query vectors and values for longer.",
        gt=0.0,
    )
    max_size: float = option(
        1_000.0,
        "Size of the store above which the oldest measured queries are deleted.",
        unit="MB",
        downside="Small forgets what was measured, and it has to be measured again after a restart.",
        ge=1.0,
    )

    @property
    def redacted_dsn(self) -> str | None:
        """The URI for people, without its password."""
        return redact_dsn(self.dsn.get_secret_value()) if self.dsn else None


class Learning(Section):
    """What is learned, and towards what; the defaults of every table."""

    enabled: bool = option(
        True,
        "Whether anything is recorded, measured and adapted at all.",
        downside="Switched off, every query runs as it came.",
        live=True,
    )
    relay_only: bool = option(
        False,
        "Whether the proxy is a pure relay: nothing is recognised, put in force, recorded or measured. A "
        "running proxy is switched by SIGUSR1 and SIGUSR2, POST /relay-only and ruvector_relay_only() "
        "(docs/security.md); set here, they cannot switch it back.",
        downside="Queries run as they came; what was learned is kept.",
        live=True,
    )
    canary_share: float = option(
        0.2,
        "Share of the queries of one kind that get a new policy at first, beside the one before; where "
        "recall or latency turn out worse, the new one is withdrawn. 0: a new policy serves all at once.",
        unit="share, 0 to 0.5",
        live=True,
        downside="Less exposes fewer queries to a policy that is wrong, and takes longer to find out.",
        ge=0.0,
        le=0.5,
    )
    canary_seconds: float = option(
        60.0,
        "Time after which a new policy serves all even where few queries were seen or audited meanwhile.",
        unit="seconds",
        live=True,
        downside="Short tells little where there is little traffic; long keeps an old policy for longer.",
        gt=0.0,
    )
    target_recall: float = option(
        0.98,
        "Recall that is to be kept: the mean share of the true nearest rows that a query returns.",
        unit="share, above 0 to 1",
        downside="The last hundredths are the dearest: 0.99 may cost twice the latency of 0.98.",
        gt=0.0,
        le=1.0,
        live=True,
    )
    optimize_for: OptimizeFor = option(
        "balanced",
        "How sure it must be that a setting keeps the target before it is chosen: "
        '"recall" about 98 %, "balanced" 84 %, "latency" 50 %.',
        downside='"recall" takes slower settings, "latency" may fall short of the target more often.',
        live=True,
    )
    learning_rate: float = option(
        0.01,
        "Share of its weight that a measured query loses with every min_samples newer ones.",
        unit="share, 0 to below 1",
        downside="Higher follows a changing table faster and knows less; 0 never forgets.",
        ge=0.0,
        lt=1.0,
        live=True,
    )
    trajectory_buffer_size: int = option(
        10_000,
        "Recorded queries that may wait in a worker for the learner; what does not fit is dropped and "
        "counted.",
        unit="queries",
        downside="Each takes about the size of its vector: 10,000 of 1536 dimensions are 60 MB per worker.",
        ge=1,
    )
    trajectory_window: int = option(
        1_000,
        "Recent queries of each table from which the learner draws those that it measures.",
        unit="queries",
        downside="A long window notices a change of traffic late; a short one sees only the latest fashion.",
        ge=1,
        live=True,
    )
    min_samples: int = option(
        100,
        "Measured queries of one kind that are needed before they are told apart by their vectors.",
        unit="queries",
        downside="Fewer adapts sooner, on thinner evidence.",
        ge=1,
        live=True,
    )
    max_patterns: int = option(
        1_000,
        "Patterns of one kind of query that a policy is made of: the queries asked most, then the newest.",
        unit="patterns",
        downside="Fewer tell queries apart less well; each is about as large as its vector, in every worker.",
        live=True,
        ge=10,
        le=3_000,
    )
    pattern_similarity: float = option(
        0.999,
        "Cosine of two queries' vectors from which they are one pattern; for the operator <-> it is "
        "1 - d * d / 2 of their distance d in units of the queries' spread, and 0.999 merges none there.",
        unit="cosine, above 0 to 1",
        downside="Lower makes fewer patterns, and averages away what tells queries apart.",
        live=True,
        gt=0.0,
        le=1.0,
    )
    pattern_consolidation_interval: float = option(
        3_600.0,
        "Time after which patterns are merged, weighed by how often they are asked now, and pruned to "
        "the most used, even where nothing new was measured.",
        unit="seconds",
        downside="Each round derives the policy anew, which takes about a second of the learner's time.",
        gt=0.0,
        live=True,
    )
    sketch_rows: int = option(
        20_000,
        "Rows of each table that the proxy keeps a sample of, to see how crowded the surroundings of a query "
        "are; at most 64 MB of vectors are read for it. 0 keeps none: then only similar queries tell how "
        "hard one is.",
        unit="rows",
        downside="More sees more: 30,000 saved 2 % of the cost; each takes about 700 bytes in every worker.",
        ge=0,
        le=200_000,
    )
    anonymize: bool = option(
        False,
        "Whether salted hashes are stored in place of query vectors and filter values.",
        downside="Choices by query vector are not possible then, only by kind of query and filter value.",
    )


def _check_table_name(name: str) -> str:
    if not re.fullmatch(r"[^.]+\..+", name):
        raise ValueError(f'a table is named with its schema, in quotation marks: [tables."public.{name}"]')
    return name


TableName = Annotated[str, AfterValidator(_check_table_name)]
"""``schema.table``, each as PostgreSQL stores it, without quotation marks of its own."""


class Table(Section):
    """Options of one table; what is left out comes from [learning]."""

    adaptive_search: bool = option(
        True,
        "Whether queries on this table get measured settings.",
        downside=(
            "Switched off, they run as they came; they are still measured, so that what is known is in "
            "force at once when it is switched on again."
        ),
        live=True,
    )
    learning: bool | None = option(
        None,
        "Whether queries on this table are recorded and measured; left out: learning.enabled.",
        downside="Switched off, nothing about its queries is kept anywhere, and none is adapted.",
        live=True,
    )
    target_recall: float | None = option(
        None,
        "Recall that is to be kept on this table; left out: learning.target_recall.",
        unit="share, above 0 to 1",
        downside="As for learning.target_recall.",
        gt=0.0,
        le=1.0,
        live=True,
    )
    optimize_for: OptimizeFor | None = option(
        None,
        "What to prefer on this table; left out: learning.optimize_for.",
        downside="As for learning.optimize_for.",
        live=True,
    )
    min_samples: int | None = option(
        None,
        "Measured queries needed on this table; left out: learning.min_samples.",
        unit="queries",
        downside="As for learning.min_samples.",
        ge=1,
        live=True,
    )
    learning_rate: float | None = option(
        None,
        "Share of its weight that a measured query loses on this table; left out: learning.learning_rate.",
        unit="share, 0 to below 1",
        downside="As for learning.learning_rate.",
        ge=0.0,
        lt=1.0,
        live=True,
    )
    trajectory_window: int | None = option(
        None,
        "Recent queries of this table to draw from; left out: learning.trajectory_window.",
        unit="queries",
        downside="As for learning.trajectory_window.",
        ge=1,
        live=True,
    )
    max_patterns: int | None = option(
        None,
        "Patterns of one kind of query on this table; left out: learning.max_patterns.",
        unit="patterns",
        downside="As for learning.max_patterns.",
        live=True,
        ge=10,
        le=3_000,
    )
    pattern_similarity: float | None = option(
        None,
        "Cosine from which two queries on this table are one pattern; left out: learning.pattern_similarity.",
        unit="cosine, above 0 to 1",
        downside="As for learning.pattern_similarity.",
        live=True,
        gt=0.0,
        le=1.0,
    )


@dataclass(frozen=True, slots=True)
class TableOptions:
    """What holds for one table once the defaults are filled in."""

    adaptive_search: bool
    learning: bool
    target_recall: float
    optimize_for: OptimizeFor
    min_samples: int
    learning_rate: float
    trajectory_window: int
    max_patterns: int
    pattern_similarity: float


class Log(Section):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = option(
        "info",
        "Least serious kind of message that is shown.",
        downside='"debug" writes a line for each connection.',
        live=True,
    )
    format: Literal["human", "json"] = option(
        "human",
        '"human" for reading, "json" for one JSON object per line.',
        downside='"json" is hard to read without a tool.',
        live=True,
    )
    slow_query: float | None = option(
        None,
        "Duration from which a vector query is logged: its statement without values, what it got and why. "
        "Left out: none is.",
        unit="seconds",
        downside="A short one fills the log; above 100 a second of each worker they are only counted.",
        ge=0.0,
        live=True,
    )


class Auth(Section):
    """How clients log in; docs/authentication.md says which way is for whom."""

    mode: Literal["relay", "scram"] = option(
        "relay",
        '"relay": the server authenticates the client, by whatever it likes, and the proxy passes '
        "messages on. "
        '"scram": the proxy authenticates the client by SCRAM-SHA-256 and logs in at the server as the '
        "same user.",
        downside=(
            '"relay" cannot pass SCRAM on between two encrypted connections to clients that support channel '
            'binding; "scram" needs auth.users_file or auth.query_dsn, whose contents let the proxy check '
            "passwords."
        ),
    )
    users_file: Path | None = option(
        None,
        'File with a line "user" "SCRAM-SHA-256$..." for each user (the format of pgbouncer\'s '
        "userlist.txt), "
        'for auth.mode = "scram". It is read again when it has changed. A relative path starts at the '
        "configuration file's directory.",
        downside=(
            "A password that is changed on the server has to be changed there, too. Passwords in plain text "
            "are possible, and whoever reads the file has them."
        ),
        strict=False,
    )
    query_dsn: Dsn | None = option(
        None,
        "Connection URI for looking users up on the server, for those that auth.users_file does not have.",
        downside=(
            "Its role can read the verifiers of all users: let it execute one function and nothing more "
            "(docs/authentication.md)."
        ),
    )
    query: str = option(
        AUTH_QUERY,
        "Statement that gets a user's name as $1 and returns no row, or one of name and SCRAM verifier. The "
        "default needs a superuser; a function with SECURITY DEFINER does not.",
        downside=(
            "A statement that ignores rolvaliduntil or rolcanlogin lets users in whom the server would not; "
            "names without a schema are at the mercy of a search_path."
        ),
        min_length=1,
    )
    query_connections: int = option(
        2,
        "Side connections of each worker for auth.query at the same time; idle ones are closed.",
        unit="connections",
        downside="More take places from clients; fewer make many simultaneous logins wait.",
        ge=1,
        le=100,
    )
    query_timeout: float = option(
        5.0,
        "Time for looking one user up, before the client gets an error.",
        unit="seconds",
        downside="Too short fails when the server is busy; too long keeps the client waiting for an error.",
        gt=0.0,
    )
    query_max_age: float = option(
        5.0,
        "Time for which a user that was looked up is remembered.",
        unit="seconds",
        downside=(
            "For so long a dropped user still gets past the proxy (not past the server, where that asks for "
            "a password), and a changed password may fail once."
        ),
        ge=0.0,
        le=3600.0,
    )
    relay_over_tls: bool = option(
        False,
        'Whether auth.mode = "relay" is allowed with both connections always encrypted.',
        downside=(
            "Clients that support channel binding, such as libpq, cannot log in then where the server asks "
            "for SCRAM; switch it on if it asks for something else, or if all clients set "
            "channel_binding=disable."
        ),
    )

    @property
    def redacted_query_dsn(self) -> str | None:
        """The URI for people, without its password."""
        return redact_dsn(self.query_dsn.get_secret_value()) if self.query_dsn else None


class Sql(Section):
    """Functions and settings that clients use from SQL; docs/sql.md describes them."""

    enabled: bool = option(
        True,
        "Whether the proxy answers ruvector_...() functions and ruvector.... settings itself.",
        downside=(
            "Switched off, they all go to the server, which knows them only if an extension of that name "
            "is installed. Switched on, the proxy's functions win over an extension's unless they are "
            "called with a schema (public.ruvector_learning_stats)."
        ),
    )
    left_to_server: str = option(
        "",
        "Functions, separated by commas, that the proxy leaves to the server all the same, where an "
        "extension has functions of these names: ruvector_learning_stats, ...",
        downside="They tell nothing of the proxy's then, and fail where the server has none.",
    )
    manager: str = option(
        "",
        "Role whose members may change the learning of any table, not only of those that they own.",
        downside="Its members can switch learning off, and forget what was learned, on every table.",
    )
    report_query_id: bool = option(
        False,
        "Whether clients are told the id of each adapted query as ParameterStatus ruvector.last_query_id.",
        downside="A driver that logs or refuses unknown parameters may mind; 80 bytes more for each query.",
    )
    max_measurements: int = option(
        1,
        "Calls of ruvector_auto_tune, ruvector_benchmark_... and ruvector_ground_truth at the same time.",
        unit="calls",
        downside="Each keeps one connection of the server busy, and disturbs what the others measure.",
        ge=1,
        le=100,
    )


class Limits(Section):
    """How long to wait, and how many clients may take how much."""

    connect_timeout: float = option(
        10.0,
        "Time for opening a connection to the server, before the client gets an error.",
        unit="seconds",
        downside=(
            "Too short fails when the server is only busy; too long keeps the client waiting for an error."
        ),
        gt=0.0,
    )
    authentication_timeout: float = option(
        60.0,
        "Time in which a new client has to send its start-up packet, to be authenticated (whoever does that) "
        "and to hear from the server that its session begins.",
        unit="seconds",
        downside=(
            "Too short fails for people who type passwords and while the server is busy; too long lets "
            "silent connections hold their place."
        ),
        gt=0.0,
    )
    drain_timeout: float = option(
        30.0,
        "Time that open transactions get for ending when the proxy is stopped; idle connections are closed"
        " at once.",
        unit="seconds",
        downside=(
            "Too short cuts transactions off; a supervisor such as Kubernetes must wait a little longer "
            "than this."
        ),
        ge=0.0,
    )
    handover_timeout: float = option(
        3600.0,
        "Time for which a worker that was replaced, by a restart without downtime, goes on serving the "
        "clients that it has; what is left then is drained.",
        unit="seconds",
        downside=(
            "Too short ends connections that a pool would have given back by itself; while it lasts, old and "
            "new workers take their memory twice."
        ),
        ge=0.0,
    )
    max_connections: int = option(
        0,
        "Clients that are served at the same time, by all workers together; 0: as many as the limit of open "
        "files allows (ulimit -n, which the proxy raises to its hard limit).",
        unit="connections",
        downside=(
            "Each takes one connection of the server: beyond the server's own max_connections clients get "
            "its error instead. Too low refuses clients (53300) that the server would have taken."
        ),
        ge=0,
    )
    max_connections_per_user: int = option(
        0,
        "The same for clients of one user; 0: no limit. The name is the one in the start-up packet.",
        unit="connections",
        downside=(
            "Who can reach the proxy can take a user's places until limits.authentication_timeout is over, "
            "without knowing the password."
        ),
        ge=0,
    )
    max_connections_per_database: int = option(
        0,
        "The same for clients of one database; 0: no limit.",
        unit="connections",
        downside="As for limits.max_connections_per_user.",
        ge=0,
    )
    max_logins: int = option(
        1_000,
        "Connections of one worker that have not yet sent their start-up packet; beyond it the one that has "
        "been silent for longest is closed. A quarter of the open files at most.",
        unit="connections",
        downside="Too few lets slow clients be crowded out where many connect at the same moment.",
        ge=1,
    )
    max_message: float = option(
        1_074.0,
        "Longest message of a client after its login; one that is longer ends its connection (54000). The "
        "server itself takes 1 GiB at most. During the login it is always 64 KB.",
        unit="MB",
        downside="Too short refuses statements, parameters and COPY rows that the server would have taken.",
        ge=0.1,
        le=1_100.0,
    )
    max_memory: float = option(
        0.0,
        "Memory of one worker above which it takes no new clients (53200) until it has shrunk; 0: no limit. "
        "Looked at every second.",
        unit="MB",
        downside=(
            "A client takes up to 1.5 MB where its messages are large or its reading slow: too little "
            "refuses clients that would have fitted. Connections that are open are never ended for it."
        ),
        ge=0.0,
    )
    keepalive_idle: int = option(
        60,
        "Silence on a TCP connection, to a client or to the server, after which the proxy asks whether the "
        "other side is still there; 0: never.",
        unit="seconds",
        downside="Short costs a packet now and then; long lets a vanished client keep its locks for so long.",
        ge=0,
        le=32_767,
    )
    keepalive_interval: int = option(
        10,
        "Time between such questions while they are not answered.",
        unit="seconds",
        downside="Short gives up on a network that was away for a moment.",
        ge=1,
        le=32_767,
    )
    keepalive_count: int = option(
        6,
        "Unanswered questions after which the other side counts as gone.",
        unit="packets",
        downside="As for limits.keepalive_interval.",
        ge=1,
        le=127,
    )


class Config(Section):
    """The complete configuration; attributes are named as the sections of the file."""

    listen: Listen = Listen()
    upstream: Upstream = Upstream()
    admin: Admin = Admin()
    workers: Workers = Workers()
    learner: Learner = Learner()
    store: Store = Store()
    learning: Learning = Learning()
    auth: Auth = Auth()
    sql: Sql = Sql()
    limits: Limits = Limits()
    log: Log = Log()
    tables: dict[TableName, Table] = Field(default={}, description=Table.__doc__)

    def table(self, name: str) -> TableOptions:
        """Return what holds for a table; `name` is its resolved name, unquoted: ``public.items``."""
        own = self.tables.get(name, _NO_OPTIONS)
        common = self.learning
        learning = common.enabled and own.learning is not False
        return TableOptions(
            adaptive_search=own.adaptive_search and learning,
            learning=learning,
            target_recall=common.target_recall if own.target_recall is None else own.target_recall,
            optimize_for=common.optimize_for if own.optimize_for is None else own.optimize_for,
            min_samples=common.min_samples if own.min_samples is None else own.min_samples,
            learning_rate=common.learning_rate if own.learning_rate is None else own.learning_rate,
            trajectory_window=(
                common.trajectory_window if own.trajectory_window is None else own.trajectory_window
            ),
            max_patterns=common.max_patterns if own.max_patterns is None else own.max_patterns,
            pattern_similarity=(
                common.pattern_similarity if own.pattern_similarity is None else own.pattern_similarity
            ),
        )

    def to_json(self) -> str:
        """Return JSON for a child process's standard input.  It contains secrets: never log or store it."""
        return self.model_dump_json(context={"secrets": True})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what `to_json` was called on."""
        return cls.model_validate_json(text)


_NO_OPTIONS = Table()


def host_port(host: str, port: int) -> str:
    """Write an address as people do, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
