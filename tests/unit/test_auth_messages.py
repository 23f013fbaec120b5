"""Authentication message by message: the client's, the login at the server, what a relay changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.auth.binding import end_point
from proxy.auth.frontend import ClientAuthentication, Credentials, State
from proxy.auth.login import UpstreamLogin
from proxy.auth.refusal import Cause, Refusal
from proxy.auth.relayed import RelayedAuthentication
from proxy.auth.scram import PLAIN, PLUS, Client, Server
from proxy.auth.users import User, UsersFileError, parse
from proxy.auth.verifier import Keys
from proxy.wire.authentication import (
    AuthenticationCleartextPassword,
    AuthenticationGSS,
    AuthenticationMD5Password,
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
)
from proxy.wire.backend import BackendKeyData, NegotiateProtocolVersion, ParameterStatus, ReadyForQuery
from proxy.wire.diagnostics import ErrorResponse, NoticeResponse
from tests.unit.certificates import CERTIFICATES

SALT = b"0123456789abcdef"
KEYS = Keys.derive(b"pencil", SALT, 4096)
VERIFIER = KEYS.verifier(SALT, 4096)
END_POINT = b"e" * 32
WORD = ord("p")
ALICE = User(verifier=VERIFIER)

OK = AuthenticationOk().encode()


def body(message: bytes) -> bytes:
    return message[5:]


class TestClient:
    def authentication(
        self, end_point: bytes | None = None, user: User | None = ALICE
    ) -> ClientAuthentication:
        return ClientAuthentication(b"alice", user, VERIFIER, end_point)

    def log_in(self, ours: ClientAuthentication, theirs: Client, keys: Keys = KEYS) -> None:
        answer = ours.receive(WORD, body(SASLInitialResponse(theirs.mechanism, theirs.first()).encode()))
        theirs.challenge(AuthenticationSASLContinue.decode(body(answer)).data)
        answer = ours.receive(WORD, theirs.response(keys))
        theirs.verify(AuthenticationSASLFinal.decode(body(answer)).data)

    @pytest.mark.parametrize(("binding", "offer"), [(None, (PLAIN,)), (END_POINT, (PLUS, PLAIN))])
    def test_what_is_offered(self, binding: bytes | None, offer: tuple[bytes, ...]) -> None:
        assert AuthenticationSASL.decode(body(self.authentication(binding).request())).mechanisms == offer

    @pytest.mark.parametrize("binding", [None, END_POINT])
    def test_a_login_leaves_credentials_behind(self, binding: bytes | None) -> None:
        ours = self.authentication(binding, User(password=b"pencil"))
        self.log_in(ours, Client((PLUS, PLAIN), end_point=binding))
        assert ours.state is State.DONE
        assert ours.credentials == Credentials(b"alice", VERIFIER, KEYS.client_key, b"pencil")
        assert "pencil" not in repr(ours.credentials)

    def test_a_client_may_wait_for_an_empty_challenge(self) -> None:
        ours, theirs = self.authentication(), Client((PLAIN,), end_point=None)
        answer = ours.receive(WORD, body(SASLInitialResponse(PLAIN, None).encode()))
        assert AuthenticationSASLContinue.decode(body(answer)).data == b""
        theirs.challenge(AuthenticationSASLContinue.decode(body(ours.receive(WORD, theirs.first()))).data)
        assert ours.receive(WORD, theirs.response(KEYS))
        assert ours.state is State.DONE

    def test_no_such_user_looks_like_a_wrong_password(self) -> None:
        refusals = []
        for ours, keys in (
            (self.authentication(user=None), KEYS),
            (self.authentication(), Keys.derive(b"pen", SALT, 4096)),
        ):
            with pytest.raises(Refusal) as caught:
                self.log_in(ours, Client((PLAIN,), end_point=None), keys)
            refusals.append((caught.value.cause, caught.value.response))
        assert refusals[0] == refusals[1]
        assert refusals[0][0] is Cause.PASSWORD

    @pytest.mark.parametrize(
        ("tag", "data", "message"),
        [
            (ord("Q"), b"SELECT 1\0", b"expected SASL response, got message type 81"),
            (WORD, b"", b"invalid message format"),
            (WORD, b"SCRAM-SHA-256\0\0\0\0\x09abc", b"invalid message format"),
            (WORD, b"SCRAM-SHA-256\0\0\0\0\0", b"malformed SCRAM message"),
            (WORD, b"SCRAM-SHA-256-PLUS\0\xff\xff\xff\xff", b"client selected an invalid SASL authentication mechanism"),
            (WORD, b"secret\0", b"invalid message format"),
        ],
    )  # fmt: skip
    def test_other_messages_are_refused(self, tag: int, data: bytes, message: bytes) -> None:
        with pytest.raises(Refusal) as caught:
            self.authentication().receive(tag, data)
        assert (caught.value.response.code, caught.value.response.message) == (b"08P01", message)

    @given(st.lists(st.tuples(st.sampled_from([WORD, WORD, WORD, 0x51]), st.binary(max_size=60)), max_size=4))
    def test_garbage_never_lets_anybody_in(self, messages: list[tuple[int, bytes]]) -> None:
        ours = self.authentication(END_POINT)
        for tag, data in messages:
            try:
                ours.receive(tag, data)
            except Refusal:
                break
        assert ours.state is not State.DONE


class TestLogin:
    """The login at the server, against the server's role of the exchange."""

    WITH_KEY = Credentials(b"alice", VERIFIER, KEYS.client_key)
    WITH_PASSWORD = Credentials(b"alice", VERIFIER, KEYS.client_key, b"pencil")

    def receive(self, login: UpstreamLogin, message: bytes) -> bytes:
        step = login.receive(message[0], message)
        assert not step.to_client
        assert not step.done
        assert step.derive is None
        return step.to_server

    def refused(self, login: UpstreamLogin, message: bytes) -> str:
        with pytest.raises(Refusal) as caught:
            login.receive(message[0], message)
        response = caught.value.response
        assert caught.value.cause is Cause.UPSTREAM
        assert response.severity == b"FATAL"
        assert response.hint
        assert b"pencil" not in response.encode()
        return (response.message or b"").decode()

    @pytest.mark.parametrize("binding", [None, END_POINT])
    def test_scram_with_the_clients_own_key(self, binding: bytes | None) -> None:
        server = Server(VERIFIER, genuine=True, end_point=binding)
        login = UpstreamLogin(self.WITH_KEY, binding)
        first = SASLInitialResponse.decode(
            body(self.receive(login, AuthenticationSASL(server.mechanisms).encode()))
        )
        assert first.mechanism == (PLUS if binding else PLAIN)
        assert first.data is not None
        challenge = server.first(first.mechanism, first.data)
        answer = SASLResponse.decode(
            body(self.receive(login, AuthenticationSASLContinue(challenge).encode()))
        )
        final = server.final(b"alice", answer.data)
        assert self.receive(login, AuthenticationSASLFinal(final).encode()) == b""
        step = login.receive(OK[0], OK)
        assert (step.done, step.to_client) == (True, OK)

    def test_scram_with_a_password_where_the_server_has_another_salt(self) -> None:
        other = Keys.derive(b"pencil", b"another salt", 5000).verifier(b"another salt", 5000)
        server = Server(other, genuine=True, end_point=None)
        login = UpstreamLogin(self.WITH_PASSWORD, None)
        first = SASLInitialResponse.decode(body(self.receive(login, AuthenticationSASL((PLAIN,)).encode())))
        challenge = AuthenticationSASLContinue(server.first(PLAIN, first.data or b"")).encode()
        step = login.receive(challenge[0], challenge)
        assert step.derive is not None
        assert not step.to_server
        step = login.with_keys(Keys.derive(b"pencil", step.derive.salt, step.derive.iterations))
        assert server.final(b"alice", SASLResponse.decode(body(step.to_server)).data)

    def test_another_salt_and_no_password(self) -> None:
        login = UpstreamLogin(self.WITH_KEY, None)
        first = SASLInitialResponse.decode(body(self.receive(login, AuthenticationSASL((PLAIN,)).encode())))
        other = Server(KEYS.verifier(b"another salt", 4096), genuine=True, end_point=None)
        challenge = AuthenticationSASLContinue(other.first(PLAIN, first.data or b"")).encode()
        assert "another SCRAM verifier" in self.refused(login, challenge)

    def test_a_server_that_does_not_know_the_user(self) -> None:
        login = UpstreamLogin(self.WITH_KEY, None)
        first = SASLInitialResponse.decode(body(self.receive(login, AuthenticationSASL((PLAIN,)).encode())))
        server = Server(VERIFIER, genuine=True, end_point=None)
        self.receive(login, AuthenticationSASLContinue(server.first(PLAIN, first.data or b"")).encode())
        forged = AuthenticationSASLFinal(b"v=" + b"A" * 43 + b"=").encode()
        assert "does not know the user's password" in self.refused(login, forged)

    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_a_server_that_breaks_scram_off_has_not_proved_itself(self, after: int) -> None:
        login = UpstreamLogin(self.WITH_KEY, None)
        server = Server(VERIFIER, genuine=True, end_point=None)
        first = SASLInitialResponse.decode(body(self.receive(login, AuthenticationSASL((PLAIN,)).encode())))
        if after:
            self.receive(login, AuthenticationSASLContinue(server.first(PLAIN, first.data or b"")).encode())
        if after == 2:
            assert "clear" in self.refused(login, AuthenticationCleartextPassword().encode()).lower()
        else:
            assert "without having proved itself" in self.refused(login, OK)

    def test_trust(self) -> None:
        step = UpstreamLogin(self.WITH_KEY, None).receive(OK[0], OK)
        assert (step.done, step.to_client, step.to_server) == (True, OK, b"")

    def test_md5(self) -> None:
        request = AuthenticationMD5Password(b"salt").encode()
        answer = PasswordMessage.decode(body(self.receive(UpstreamLogin(self.WITH_PASSWORD, None), request)))
        inner = hashlib.md5(b"pencilalice").hexdigest().encode()
        assert answer.password == b"md5" + hashlib.md5(inner + b"salt").hexdigest().encode()

    def test_clear_text(self) -> None:
        request = AuthenticationCleartextPassword().encode()
        login = UpstreamLogin(self.WITH_PASSWORD, None)
        assert PasswordMessage.decode(body(self.receive(login, request))).password == b"pencil"

    @pytest.mark.parametrize(
        ("message", "problem"),
        [
            (AuthenticationCleartextPassword().encode(), "asks for the password itself"),
            (AuthenticationMD5Password(b"salt").encode(), "asks for an md5 hash"),
            (AuthenticationGSS().encode(), "asks for GSS"),
            (AuthenticationSASLContinue(b"r=x").encode(), "asks for SASLContinue"),
            (AuthenticationSASLFinal(b"v=x").encode(), "asks for SASLFinal"),
            (AuthenticationSASL((b"OAUTHBEARER",)).encode(), "offers OAUTHBEARER"),
            (b"R\0\0\0\x08\0\0\0\x63", "code 99"),
            (b"Z\0\0\0\x05I", "tag 'Z'"),
            (b"E\0\0\0\x06SX", "malformed error"),
        ],
    )
    def test_what_cannot_be_answered(self, message: bytes, problem: str) -> None:
        assert problem in self.refused(UpstreamLogin(self.WITH_KEY, None), message)

    def test_the_servers_own_error_is_passed_on(self) -> None:
        error = ErrorResponse.create(b"FATAL", b"53300", b"sorry, too many clients already").encode()
        with pytest.raises(Refusal) as caught:
            UpstreamLogin(self.WITH_KEY, None).receive(error[0], error)
        assert caught.value.response.encode() == error

    def test_a_refused_password_says_that_the_proxy_took_it(self) -> None:
        error = ErrorResponse.create(b"FATAL", b"28P01", b'password authentication failed for user "alice"')
        assert "password authentication failed" in self.refused(
            UpstreamLogin(self.WITH_KEY, None), error.encode()
        )

    @pytest.mark.parametrize(
        "message",
        [
            NegotiateProtocolVersion(196610, ()).encode(),
            NoticeResponse.create(b"WARNING", b"01000", b"hello").encode(),
        ],
    )
    def test_what_may_come_at_any_time_is_passed_on(self, message: bytes) -> None:
        step = UpstreamLogin(self.WITH_KEY, None).receive(message[0], message)
        assert (step.to_client, step.done, step.to_server) == (message, False, b"")


@given(st.lists(st.tuples(st.integers(0, 13), st.binary(max_size=40)), max_size=5), st.booleans())
def test_a_login_ends_well_with_the_servers_ok_only(requests: list[tuple[int, bytes]], bound: bool) -> None:
    login = UpstreamLogin(TestLogin.WITH_PASSWORD, END_POINT if bound else None)
    for code, data in requests:
        content = code.to_bytes(4, "big") + data
        message = b"R" + (len(content) + 4).to_bytes(4, "big") + content
        try:
            step = login.receive(message[0], message)
        except Refusal:
            return
        if step.done:
            assert message == OK
            return
        assert not step.to_client


OFFER = AuthenticationSASL((PLUS, PLAIN)).encode()
STRIPPED = AuthenticationSASL((PLAIN,)).encode()
REST = (
    AuthenticationSASLContinue(b"r=1").encode()
    + AuthenticationSASLFinal(b"v=1").encode()
    + OK
    + ParameterStatus(b"a", b"b").encode()
    + BackendKeyData(1, b"1234").encode()
    + ReadyForQuery(ord("I")).encode()
)


def in_pieces(data: bytes, size: int, receive: Callable[[bytes], bytes]) -> bytes:
    return b"".join(receive(data[i : i + size]) for i in range(0, len(data), size))


class TestRelayed:
    @pytest.mark.parametrize("size", [1, 7, 10_000])
    def test_a_plain_client_is_not_offered_binding(self, size: int) -> None:
        watch = RelayedAuthentication(client_tls=False)
        prelude = NegotiateProtocolVersion(196610, ()).encode()
        assert in_pieces(prelude + OFFER + REST, size, watch.from_server) == prelude + STRIPPED + REST
        assert watch.over

    @pytest.mark.parametrize("size", [1, 7, 10_000])
    def test_an_encrypted_client_gets_all_as_it_is(self, size: int) -> None:
        watch = RelayedAuthentication(client_tls=True)
        assert in_pieces(OFFER + REST, size, watch.from_server) == OFFER + REST

    @pytest.mark.parametrize(
        "first",
        [
            OK,
            AuthenticationMD5Password(b"salt").encode(),
            AuthenticationSASL((b"OAUTHBEARER",)).encode(),
            ErrorResponse.create(b"FATAL", b"28000", b"no pg_hba.conf entry").encode(),
            b"E\0\0\0\0",  # no header: the session's business
            b"EFATAL: could not fork\n\0",
            b"R\0\0\0\x05\0",
            b"R\0\0\0\x08\0\0\0\x63",  # a method that is still to come
            AuthenticationSASL(()).encode()[:-1] + b"x",
        ],
    )
    @pytest.mark.parametrize("client_tls", [False, True])
    @pytest.mark.parametrize("size", [1, 10_000])
    def test_everything_else_is_untouched(self, first: bytes, client_tls: bool, size: int) -> None:
        watch = RelayedAuthentication(client_tls=client_tls)
        data = first + REST
        assert in_pieces(data, size, watch.from_server) == data

    @pytest.mark.parametrize("size", [1, 7, 10_000])
    @pytest.mark.parametrize(
        "response",
        [
            SASLInitialResponse(PLUS, b"p=tls-server-end-point,,n=,r=x"),
            SASLInitialResponse(PLAIN, b"y,,n=,r=x"),
        ],
    )
    def test_a_client_that_would_bind_is_told_what_to_do(
        self, response: SASLInitialResponse, size: int
    ) -> None:
        watch = RelayedAuthentication(client_tls=True)
        watch.from_server(OFFER)
        with pytest.raises(Refusal) as caught:
            in_pieces(response.encode(), size, watch.from_client)
        assert caught.value.cause is Cause.BINDING
        for remedy in (
            b'auth.mode = "scram"',
            b"listen.tls_mode",
            b"upstream.sslmode",
            b"channel_binding=disable",
        ):
            assert remedy in (caught.value.response.hint or b"")

    @pytest.mark.parametrize("size", [1, 7, 10_000])
    @pytest.mark.parametrize(
        "response",
        [
            SASLInitialResponse(PLAIN, b"n,,n=,r=x"),
            SASLInitialResponse(PLAIN, None),
            SASLInitialResponse(b"OAUTHBEARER", b"y,,"),
            SASLInitialResponse(b"", b""),
            PasswordMessage(b"y"),
        ],
    )
    def test_other_clients_pass(self, response: SASLInitialResponse | PasswordMessage, size: int) -> None:
        watch = RelayedAuthentication(client_tls=True)
        watch.from_server(OFFER)
        data = response.encode() + SASLResponse(b"c=biws").encode()
        assert in_pieces(data, size, watch.from_client) == data

    @pytest.mark.parametrize("client_tls", [False, True])
    def test_a_client_that_speaks_before_it_is_asked(self, client_tls: bool) -> None:
        watch = RelayedAuthentication(client_tls=client_tls)
        data = SASLInitialResponse(PLUS, b"p=").encode()
        assert watch.from_client(data) == data

    @given(st.lists(st.binary(max_size=30), max_size=5), st.booleans())
    def test_garbage_passes_untouched_as_soon_as_it_is_seen_to_be_that(
        self, chunks: list[bytes], client_tls: bool
    ) -> None:
        watch = RelayedAuthentication(client_tls=client_tls)
        out = b"".join(map(watch.from_server, chunks))
        assert b"".join(chunks).startswith(out)


class TestEndPoint:
    @pytest.mark.parametrize(
        ("certificate", "function"),
        [
            ("sha1", "sha256"),
            ("sha256", "sha256"),
            ("sha384", "sha384"),
            ("sha512", "sha512"),
            ("pss", "sha384"),
        ],
    )
    def test_the_hash_is_that_of_the_signature(self, certificate: str, function: str) -> None:
        der = CERTIFICATES[certificate]
        assert end_point(der) == hashlib.new(function, der).digest()

    def test_a_signature_without_a_hash_has_no_binding(self) -> None:
        assert end_point(CERTIFICATES["ed25519"]) is None

    @given(st.binary(max_size=60))
    def test_what_is_no_certificate_has_none(self, data: bytes) -> None:
        assert end_point(data) is None


class TestUsersFile:
    def test_verifiers_passwords_comments_and_quotation_marks(self) -> None:
        users = parse(
            f"""
; a comment
# another
"alice" "{VERIFIER.encode()}"
  "bob"\t"pass word" trailing words are ignored
"say ""hi"" now" "quo""te"
"ünal" "schlüssel"
"""
        )
        assert users == {
            b"alice": User(verifier=VERIFIER),
            b"bob": User(password=b"pass word"),
            b'say "hi" now': User(password=b'quo"te'),
            "ünal".encode(): User(password="schlüssel".encode()),
        }
        assert "pass word" not in repr(users)

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("alice secret", 'should be "user"'),
            ('"alice" "secret', 'should be "user"'),
            ('"alice"', 'should be "user"'),
            ('"alice" "secret"x', 'should be "user"'),
            ('"" "secret"', "name is empty"),
            ('"alice" ""', "password is empty"),
            (f'"alice" "md5{"0" * 32}"', "SET password_encryption"),
            ('"alice" "SCRAM-SHA-256$secret"', "no SCRAM-SHA-256 verifier"),
            ('"alice" "SCRAM-SHA-512$4096:secret"', "no SCRAM-SHA-256 verifier"),
            ('"a" "b"\n"a" "secret"', "there twice"),
        ],
    )
    def test_a_wrong_line_is_named_and_its_secret_is_not(self, line: str, problem: str) -> None:
        with pytest.raises(UsersFileError, match=problem) as caught:
            parse("; first\n" + line)
        assert f"line {2 + line.count(chr(10))}: " in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_all_problems_are_reported_and_not_without_end(self) -> None:
        with pytest.raises(UsersFileError) as caught:
            parse("x\n" * 100)
        assert len(caught.value.problems) == 20

    @given(st.text())
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        try:
            parse(text)
        except UsersFileError:
            pass
