"""Who may log in: authentication that the proxy watches, or ends itself.

Theory
------
``relay`` (the default): the client authenticates to the server, the proxy passes messages on and knows no
secret.  One message may need a change: a server that is reached with TLS offers channel binding
(SCRAM-SHA-256-PLUS), which ties the exchange to *its* certificate; a client without TLS could not use it
and gives up, so the offer is taken out (`relayed`).

``scram``: the proxy authenticates the client itself by SCRAM-SHA-256 (RFC 5802, RFC 7677), with channel
binding to its own certificate where the client comes with TLS, and then logs in upstream as the same user.
For that it needs no password.  A SCRAM verifier, what PostgreSQL stores, is enough: the client's proof
discloses the ClientKey to whoever holds the verifier, and with the ClientKey one can log in wherever the
same verifier is stored.

    verifier    SCRAM verifiers and keys: parse, derive; stand-ins for users that do not exist
    scram       the exchange, both roles
    binding     the channel binding of a certificate
    users       the users file
    frontend    authentication of the client, message by message
    login       the login at the server, message by message
    relayed     the relay's two exceptions
    lookup      where verifiers come from: users file, query on the server (the only part with I/O)

Rules
-----
* Messages in, messages out; no sockets, no event loop, no clock, except in `lookup`.
* A user who does not exist is answered like one with another password: same messages, same salt each time.
* The client gets the server's own words wherever the server has words for it: same severity, code, message,
  detail.
* Passwords, keys and verifiers are kept out of `repr`, logs and errors.
"""
