"""The SCRAM exchange: the RFC's vectors, every wrong turn, and scramp as an independent peer."""

from __future__ import annotations

import hashlib
import stringprep
from base64 import b64decode, b64encode

import pytest
import scramp
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.auth.refusal import Refusal
from proxy.auth.scram import PLAIN, PLUS, Client, Server, ServerMisbehaved
from proxy.auth.verifier import Keys, StandIns, Verifier, prepare

# RFC 7677, section 3.
SALT = b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
KEYS = Keys.derive(b"pencil", SALT, 4096)
VERIFIER = KEYS.verifier(SALT, 4096)
CLIENT_NONCE = b"rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
NONCE = CLIENT_NONCE + SERVER_NONCE
SERVER_FIRST = b"r=" + NONCE + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
CLIENT_FINAL = b"c=biws,r=" + NONCE + b",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="

END_POINT = hashlib.sha256(b"a certificate").digest()


def server(end_point: bytes | None = None, *, genuine: bool = True) -> Server:
    return Server(VERIFIER, genuine=genuine, end_point=end_point, nonce=SERVER_NONCE)


def converse(ours: Server, theirs: Client, keys: Keys = KEYS) -> None:
    theirs.challenge(ours.first(theirs.mechanism, theirs.first()))
    theirs.verify(ours.final(b"user", theirs.response(keys)))


def refused(error: pytest.ExceptionInfo[Refusal]) -> tuple[str, str, str]:
    response = error.value.response
    assert response.severity == b"FATAL"
    return tuple((part or b"").decode() for part in (response.code, response.message, response.detail))  # type: ignore[return-value]


class TestVectors:
    def test_the_server_says_what_the_rfc_says(self) -> None:
        ours = server()
        assert ours.first(PLAIN, b"n,,n=user,r=" + CLIENT_NONCE) == SERVER_FIRST
        assert ours.final(b"user", CLIENT_FINAL) == SERVER_FINAL

    def test_the_proof_discloses_the_client_key(self) -> None:
        ours = server()
        ours.first(PLAIN, b"n,,n=user,r=" + CLIENT_NONCE)
        assert ours.client_key is None
        ours.final(b"user", CLIENT_FINAL)
        assert ours.client_key == KEYS.client_key

    def test_the_client_accepts_what_the_server_proves(self) -> None:
        client = Client((PLAIN,), end_point=None, nonce=CLIENT_NONCE)
        assert client.first() == b"n,,n=,r=" + CLIENT_NONCE
        client.challenge(SERVER_FIRST)
        assert (client.salt, client.iterations) == (SALT, 4096)
        assert client.response(KEYS).startswith(b"c=biws,r=" + NONCE + b",p=")


class TestTheServerRefuses:
    def final_after(self, first: bytes, final: bytes, mechanism: bytes = PLAIN) -> tuple[str, str, str]:
        ours = server(END_POINT if mechanism == PLUS else None)
        ours.first(mechanism, first)
        with pytest.raises(Refusal) as caught:
            ours.final(b"mallory", final)
        assert ours.client_key is None
        return refused(caught)

    @pytest.mark.parametrize(
        ("message", "code", "detail"),
        [
            (b"", "08P01", "The message is empty."),
            (b"n,,n=,r=a\0b", "08P01", "Message length does not match input length."),
            (b"x,,n=,r=a", "08P01", "Unexpected channel-binding flag \"'x'\"."),
            (b"\xff,,n=,r=a", "08P01", 'Unexpected channel-binding flag "0xff".'),
            (b"nn,,n=,r=a", "08P01", "Comma expected, but found character \"'n'\"."),
            (b"n", "08P01", 'Comma expected, but found character "0x00".'),
            (b"n,x,n=,r=a", "08P01", "Unexpected attribute \"'x'\" in client-first-message."),
            (b"n,,x=,r=a", "08P01", 'Expected attribute "n" but found "\'x\'".'),
            (b"n,,n", "08P01", 'Expected character "=" for attribute "n".'),
            (b"n,,n=user", "08P01", 'Expected attribute "r" but found "0x00".'),
            (b"n,,n=,r=a,1=2", "08P01", "Attribute expected, but found invalid character \"'1'\"."),
            (b"n,,n=,r=a,xy", "08P01", 'Expected character "=" for attribute "x".'),
            (
                b"p=tls-server-end-point,,n=,r=a",
                "08P01",
                "The client selected SCRAM-SHA-256 without channel bind",
            ),
            (b"n,a=other,n=,r=a", "0A000", ""),
            (b"n,,m=1,n=,r=a", "0A000", ""),
            (b"n,,n=,r=\x01", "08P01", ""),
        ],
    )
    def test_a_malformed_first_message(self, message: bytes, code: str, detail: str) -> None:
        with pytest.raises(Refusal) as caught:
            server().first(PLAIN, message)
        found = refused(caught)
        assert found[0] == code
        assert found[2].startswith(detail)

    @pytest.mark.parametrize("mechanism", [PLUS, b"SCRAM-SHA-1", b"", b"PLAIN"])
    def test_what_is_not_on_offer(self, mechanism: bytes) -> None:
        with pytest.raises(Refusal) as caught:
            server().first(mechanism, b"n,,n=,r=a")
        assert refused(caught)[:2] == ("08P01", "client selected an invalid SASL authentication mechanism")

    def test_the_flag_of_a_downgrade_where_binding_was_offered(self) -> None:
        with pytest.raises(Refusal) as caught:
            server(END_POINT).first(PLAIN, b"y,,n=,r=a")
        assert refused(caught)[:2] == ("28000", "SCRAM channel binding negotiation error")

    def test_not_that_flag_where_none_was_offered(self) -> None:
        assert server().first(PLAIN, b"y,,n=,r=a")

    @pytest.mark.parametrize("flag", [b"n", b"y"])
    def test_plus_without_binding(self, flag: bytes) -> None:
        with pytest.raises(Refusal) as caught:
            server(END_POINT).first(PLUS, flag + b",,n=,r=a")
        assert refused(caught)[0] == "08P01"

    def test_another_kind_of_binding(self) -> None:
        with pytest.raises(Refusal) as caught:
            server(END_POINT).first(PLUS, b"p=tls-unique,,n=,r=a")
        assert refused(caught)[:2] == ("08P01", 'unsupported SCRAM channel-binding type "tls-unique"')

    def test_the_binding_of_another_certificate(self) -> None:
        theirs = Client((PLUS,), end_point=hashlib.sha256(b"another").digest())
        ours = server(END_POINT)
        theirs.challenge(ours.first(theirs.mechanism, theirs.first()))
        with pytest.raises(Refusal) as caught:
            ours.final(b"user", theirs.response(KEYS))
        assert refused(caught)[:2] == ("28000", "SCRAM channel binding check failed")
        assert ours.client_key is None

    @pytest.mark.parametrize(
        ("final", "message", "detail"),
        [
            (b"", "malformed SCRAM message", "The message is empty."),
            (b"c=eSws,r=x,p=", "unexpected SCRAM channel-binding attribute in client-final-message", ""),
            (b"r=x", "malformed SCRAM message", 'Expected attribute "c" but found "\'r\'".'),
            (b"c=biws", "malformed SCRAM message", 'Expected attribute "r" but found "0x00".'),
            (b"c=biws,r=" + NONCE, "malformed SCRAM message", "Attribute expected, but found end of string."),
            (b"c=biws,r=" + NONCE + b",p=AAAA", "malformed SCRAM message", "Malformed proof in client-final-message."),
            (b"c=biws,r=" + NONCE + b",p=?", "malformed SCRAM message", "Malformed proof in client-final-message."),
            (CLIENT_FINAL + b",x=1", "malformed SCRAM message", "Garbage found at the end of client-final-message."),
            (CLIENT_FINAL.replace(SERVER_NONCE, b"other"), "invalid SCRAM response", "Nonce does not match."),
            (CLIENT_FINAL.replace(CLIENT_NONCE, b"other"), "invalid SCRAM response", "Nonce does not match."),
        ],
    )  # fmt: skip
    def test_a_malformed_last_message(self, final: bytes, message: str, detail: str) -> None:
        found = self.final_after(b"n,,n=user,r=" + CLIENT_NONCE, final)
        assert found == ("08P01", message, detail)

    def test_a_proof_by_another_password(self) -> None:
        theirs = Client((PLAIN,), end_point=None)
        with pytest.raises(Refusal) as caught:
            converse(server(), theirs, Keys.derive(b"pencils", SALT, 4096))
        assert refused(caught) == ("28P01", 'password authentication failed for user "user"', "")

    def test_a_right_proof_for_a_stand_in(self) -> None:
        with pytest.raises(Refusal) as caught:
            converse(server(genuine=False), Client((PLAIN,), end_point=None))
        assert refused(caught)[0] == "28P01"

    def test_a_proof_for_a_changed_message(self) -> None:
        """An optional extension is part of what is proved."""
        final = CLIENT_FINAL.replace(b",p=", b",x=1,p=")
        assert self.final_after(b"n,,n=user,r=" + CLIENT_NONCE, final)[0] == "28P01"

    @given(st.binary(max_size=80), st.binary(max_size=80), st.sampled_from([PLAIN, PLUS]))
    def test_anything_with_a_refusal_and_nothing_else(
        self, first: bytes, final: bytes, mechanism: bytes
    ) -> None:
        ours = server(END_POINT)
        try:
            ours.first(mechanism, first)
        except Refusal:
            return
        with pytest.raises(Refusal):
            ours.final(b"user", final)

    @given(
        st.lists(
            st.tuples(st.integers(0, len(CLIENT_FINAL) - 1), st.integers(1, 255)), min_size=1, max_size=3
        )
    )
    def test_every_damaged_proof(self, damage: list[tuple[int, int]]) -> None:
        final = bytearray(CLIENT_FINAL)
        for position, difference in damage:
            final[position] ^= difference
        ours = server()
        ours.first(PLAIN, b"n,,n=user,r=" + CLIENT_NONCE)
        if bytes(final) != CLIENT_FINAL:
            with pytest.raises(Refusal):
                ours.final(b"user", bytes(final))


class TestTheClientRefuses:
    def challenged(self) -> Client:
        client = Client((PLAIN,), end_point=None, nonce=CLIENT_NONCE)
        client.challenge(SERVER_FIRST)
        client.response(KEYS)
        return client

    @pytest.mark.parametrize(
        "message",
        [
            b"",
            b"e=other-error",
            b"r=" + NONCE,
            b"r=" + CLIENT_NONCE + b",s=AAAA,i=4096",  # adds nothing of its own
            b"r=another" + SERVER_NONCE + b",s=AAAA,i=4096",
            b"r=" + NONCE + b",s=???,i=4096",
            b"r=" + NONCE + b",s=AAAA,i=0",
            b"r=" + NONCE + b",s=AAAA,i=-1",
            b"r=" + NONCE + b",s=AAAA,i=99999999",
            b"r=" + NONCE + b",s=AAAA,i=4096x",
        ],
    )
    def test_a_wrong_challenge(self, message: bytes) -> None:
        with pytest.raises(ServerMisbehaved):
            Client((PLAIN,), end_point=None, nonce=CLIENT_NONCE).challenge(message)

    @pytest.mark.parametrize("message", [b"", b"e=invalid-proof", b"v=AAAA", b"v=?", SERVER_FINAL])
    def test_a_server_that_does_not_prove_itself(self, message: bytes) -> None:
        """Even the right signature, of another exchange: the name is part of what is signed."""
        with pytest.raises(ServerMisbehaved):
            self.challenged().verify(message)

    def test_a_signature_before_there_is_something_to_sign(self) -> None:
        with pytest.raises(ServerMisbehaved):
            Client((PLAIN,), end_point=None).verify(b"v=")

    @pytest.mark.parametrize("offered", [(), (b"OAUTHBEARER",), (PLUS,)])
    def test_a_server_without_scram(self, offered: tuple[bytes, ...]) -> None:
        with pytest.raises(ServerMisbehaved, match="not SCRAM-SHA-256"):
            Client(offered, end_point=None)


class TestChannelBinding:
    def test_it_is_used_where_both_can(self) -> None:
        theirs = Client((PLUS, PLAIN), end_point=END_POINT)
        assert theirs.mechanism == PLUS
        converse(server(END_POINT), theirs)

    def test_a_client_with_tls_says_that_it_could_have(self) -> None:
        assert Client((PLAIN,), end_point=END_POINT).first().startswith(b"y,,")

    def test_taking_the_offer_away_is_found_out(self) -> None:
        theirs = Client((PLAIN,), end_point=END_POINT)
        with pytest.raises(Refusal):
            converse(server(END_POINT), theirs)

    def test_a_client_without_is_let_in(self) -> None:
        converse(server(END_POINT), Client((PLUS, PLAIN), end_point=None))


class TestAgainstScramp:
    """Another implementation plays the other side."""

    @pytest.mark.parametrize("bound", [False, True])
    @given(password=st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text))
    def test_its_client_is_let_in(self, bound: bool, password: str) -> None:
        # SASLprep leaves nothing of it: scramp takes nothing, PostgreSQL (pg_saslprep) and we the text as it is.
        assume(not all(map(stringprep.in_table_b1, password)))
        end_point = END_POINT if bound else None
        channel = ("tls-server-end-point", END_POINT) if bound else None
        names = [name.decode() for name in ((PLUS, PLAIN) if bound else (PLAIN,))]
        try:
            theirs = scramp.ScramClient(names, "user", password, channel_binding=channel)
            first = theirs.get_client_first().encode()
            ours = Server(
                Keys.derive(password.encode(), SALT, 4096).verifier(SALT, 4096),
                genuine=True,
                end_point=end_point,
            )
            theirs.set_server_first(ours.first(theirs.mechanism_name.encode(), first).decode())
            final = theirs.get_client_final().encode()
        except scramp.ScramException:
            return  # SASLprep forbids the password; PostgreSQL, and we, take it as it is
        theirs.set_server_final(ours.final(b"user", final).decode())

    @pytest.mark.parametrize("bound", [False, True])
    def test_its_server_lets_ours_in(self, bound: bool) -> None:
        mechanism = scramp.ScramMechanism((PLUS if bound else PLAIN).decode())
        stored = mechanism.make_auth_info("pencil", salt=SALT)
        channel = ("tls-server-end-point", END_POINT) if bound else None
        theirs = mechanism.make_server(lambda _: stored, channel_binding=channel)
        ours = Client((mechanism.name.encode(),), end_point=END_POINT if bound else None)
        theirs.set_client_first(ours.first().decode().replace("n=,", "n=user,"))
        ours._bare = ours._bare.replace(b"n=,", b"n=user,")  # scramp refuses libpq's empty name
        ours.challenge(theirs.get_server_first().encode())
        theirs.set_client_final(ours.response(Keys.derive(b"pencil", ours.salt, ours.iterations)).decode())
        ours.verify(theirs.get_server_final().encode())


class TestVerifier:
    TEXT = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="

    def test_the_rfcs_user_in_postgresqls_notation(self) -> None:
        assert VERIFIER.encode() == self.TEXT
        assert Verifier.parse(self.TEXT) == VERIFIER

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "SCRAM-SHA-256",
            TEXT[:-2],
            TEXT.replace("4096", "0"),
            TEXT.replace("4096", "99999999"),
            TEXT.replace("4096", "-1"),
            TEXT.replace("W22", "?22"),
            TEXT.replace("=:", "=:AAAA"),
            TEXT.replace("256", "512"),
            TEXT + "\n",
            "md5" + "0" * 32,
        ],
    )
    def test_what_is_none_is_refused_without_showing_it(self, text: str) -> None:
        with pytest.raises(ValueError, match="SCRAM-SHA-256 verifier") as caught:
            Verifier.parse(text)
        assert "WG5d8" not in str(caught.value)

    def test_nothing_secret_is_shown(self) -> None:
        shown = repr((VERIFIER, KEYS, StandIns(b"hush")))
        assert repr(VERIFIER.stored_key) not in shown
        assert repr(KEYS.client_key) not in shown
        assert "hush" not in shown

    @given(
        st.binary(min_size=1, max_size=40), st.integers(1, 10_000_000), st.binary(min_size=32, max_size=32)
    )
    def test_reading_undoes_writing(self, salt: bytes, iterations: int, key: bytes) -> None:
        verifier = Verifier(salt, iterations, key, key[::-1])
        assert Verifier.parse(verifier.encode()) == verifier


class TestPasswords:
    @pytest.mark.parametrize(
        ("password", "prepared"),
        [
            ("pencil", "pencil"),
            ("I\u00adX", "IX"),  # RFC 4013, section 3
            ("\u00aa", "a"),
            ("\u2168", "IX"),
            ("a\u00a0b", "a b"),
            ("\u0007", "\u0007"),  # prohibited: as it is
            ("\u0627\u0031", "\u0627\u0031"),
            ("\u00ad", "\u00ad"),  # nothing would be left
        ],
    )
    def test_they_are_normalised_as_postgresql_does(self, password: str, prepared: str) -> None:
        assert prepare(password.encode()) == prepared.encode()

    def test_what_is_not_utf8_is_taken_as_it_is(self) -> None:
        assert prepare(b"caf\xe9") == b"caf\xe9"


class TestStandIns:
    def test_they_are_the_same_each_time_and_different_for_each_user(self) -> None:
        secret = b"s" * 32
        first, again = StandIns(secret).verifier(b"a"), StandIns(secret).verifier(b"a")
        assert first == again
        assert first.salt != StandIns(secret).verifier(b"b").salt
        assert first.salt != StandIns(b"t" * 32).verifier(b"a").salt

    def test_they_look_like_real_ones(self) -> None:
        verifier = StandIns(b"s" * 32).verifier(b"a", 10_000)
        assert len(verifier.salt) == 16
        assert verifier.iterations == 10_000
        first = Server(verifier, genuine=False, end_point=None).first(PLAIN, b"n,,n=,r=a")
        assert b",s=" + b64encode(verifier.salt) + b",i=10000" in first
