"""A small application on SQLAlchemy and pgvector-python, as its own test: psycopg and asyncpg underneath.

Run by pytest in an environment of its own (see ``tests/conformance/orm.py``); the server comes from libpq's
variables.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
from pgvector.sqlalchemy import Vector
from sqlalchemy import ForeignKey, Index, create_engine, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload

ADDRESS = "{user}@{host}:{port}/{database}".format(
    user=os.environ["PGUSER"],
    host=os.environ["PGHOST"],
    port=os.environ["PGPORT"],
    database=os.environ["PGDATABASE"],
)
COUNT = 300


class Base(DeclarativeBase):
    pass


class Section(Base):
    __tablename__ = "section"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    articles: Mapped[list[Article]] = relationship(back_populates="section")


class Article(Base):
    __tablename__ = "article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    section_id: Mapped[int] = mapped_column(ForeignKey("section.id"))
    section: Mapped[Section] = relationship(back_populates="articles")
    embedding: Mapped[list[float]] = mapped_column(Vector(3))


Index(
    "article_embedding",
    Article.embedding,
    postgresql_using="hnsw",
    postgresql_ops={"embedding": "vector_l2_ops"},
)


def embedding(number: int) -> list[float]:
    return [float(number), number / 2, 1.0]


def nearest(number: int, k: int = 5):
    return select(Article).order_by(Article.embedding.l2_distance(embedding(number))).limit(k)


@pytest.fixture(scope="module", autouse=True)
def _schema() -> Iterator[None]:
    engine = create_engine(f"postgresql+psycopg://{ADDRESS}")
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        sections = [Section(id=i, name=f"section {i}") for i in range(4)]
        session.add_all(sections)
        session.add_all(
            Article(id=i, title=f"article {i}", section=sections[i % 4], embedding=embedding(i))
            for i in range(COUNT)
        )
    yield
    Base.metadata.drop_all(engine)
    engine.dispose()


@contextmanager
def a_session(**options: object) -> Iterator[Session]:
    engine = create_engine(f"postgresql+psycopg://{ADDRESS}", **options)
    try:
        with Session(engine) as session:
            yield session
    finally:
        engine.dispose()


@asynccontextmanager
async def an_async_session(**options: object) -> AsyncIterator[AsyncSession]:
    engine = create_async_engine(f"postgresql+asyncpg://{ADDRESS}", **options)
    try:
        async with AsyncSession(engine) as session:
            yield session
    finally:
        await engine.dispose()


# -- psycopg ---------------------------------------------------------------------------------------------


def test_nearest_neighbours_again_and_again() -> None:
    with a_session() as session:
        for number in range(0, COUNT, 17):  # psycopg prepares the statement by itself, after five times
            found = session.scalars(nearest(number)).all()
            assert found[0].id == number
            assert len(found) == 5


def test_distances_and_filters() -> None:
    distance = Article.embedding.cosine_distance(embedding(7)).label("distance")
    query = select(Article.id, distance).where(Article.section_id == 3).order_by(distance).limit(3)
    with a_session() as session:
        rows = session.execute(query).all()
        assert rows[0].id == 7
        assert rows[0].distance == pytest.approx(0, abs=1e-6)
        assert all(row.id % 4 == 3 for row in rows)


def test_relations_are_loaded_beside_a_search() -> None:
    with a_session() as session:
        found = session.scalars(nearest(9, 3).options(selectinload(Article.section))).all()
        assert [article.section.name for article in found[:1]] == ["section 1"]


def test_a_transaction_with_savepoints() -> None:
    with a_session() as session:
        with session.begin():
            section = session.scalars(select(Section).where(Section.name == "section 0")).one()
            session.add(Article(id=1000, title="new", section=section, embedding=embedding(1000)))
            session.flush()
            with pytest.raises(IntegrityError), session.begin_nested():
                session.execute(insert(Section).values(id=99, name="section 1"))
            assert session.scalars(nearest(1000, 1)).one().title == "new"
            with session.begin_nested():
                session.execute(update(Article).where(Article.id == 1000).values(title="newer"))
        assert session.scalars(nearest(1000, 1)).one().title == "newer"
        session.delete(session.get_one(Article, 1000))
        session.commit()
        assert session.scalars(nearest(1000, 1)).one().id == COUNT - 1


def test_roll_back_after_an_error_in_a_search() -> None:
    with a_session() as session:
        with pytest.raises(DBAPIError, match="different vector dimensions"):
            session.execute(text("SELECT id FROM article ORDER BY embedding <-> '[1,2]' LIMIT 1"))
        session.rollback()
        assert session.scalars(nearest(3, 1)).one().id == 3


def test_a_server_side_cursor() -> None:
    with a_session() as session:
        query = select(Article.id).order_by(Article.id).execution_options(yield_per=7)
        parts = [len(part) for part in session.scalars(query).partitions()]
        assert sum(parts) == COUNT
        assert parts[0] == 7
        near = session.scalars(nearest(20, 30).execution_options(yield_per=4))
        assert next(iter(near)).id == 20
        near.close()
        assert session.scalar(select(func.count(Article.id))) == COUNT


def test_every_isolation_level() -> None:
    for level in ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"):
        with a_session(isolation_level=level) as session:
            assert session.scalars(nearest(5, 1)).one().id == 5
            shown = session.scalar(text("SHOW transaction_isolation"))
            assert shown == ("read committed" if level == "AUTOCOMMIT" else level.lower())


def test_settings_of_the_application() -> None:
    with a_session() as session:
        session.execute(text("SET LOCAL hnsw.ef_search = 33"))
        assert session.scalars(nearest(6, 1)).one().id == 6
        assert session.scalar(text("SHOW hnsw.ef_search")) == "33"
        session.commit()
        assert session.scalars(nearest(6, 1)).one().id == 6
        assert session.scalar(text("SHOW hnsw.ef_search")) == "40"


def test_many_rows_in_one_statement() -> None:
    with a_session() as session:
        rows = [
            {"id": 2000 + i, "title": "bulk", "section_id": 1, "embedding": embedding(i)} for i in range(1500)
        ]
        session.execute(Article.__table__.insert(), rows)
        assert session.scalar(select(func.count(Article.id)).where(Article.title == "bulk")) == 1500
        session.rollback()


def test_a_pool_that_looks_before_it_gives() -> None:
    engine = create_engine(f"postgresql+psycopg://{ADDRESS}", pool_size=2, pool_pre_ping=True)
    for number in range(20):
        with Session(engine) as session:
            assert session.scalars(nearest(number, 1)).one().id == number
    engine.dispose()


# -- asyncpg ---------------------------------------------------------------------------------------------


def test_asyncpg_nearest_neighbours() -> None:
    async def run() -> None:
        async with an_async_session() as session:
            for number in range(0, COUNT, 17):
                assert (await session.scalars(nearest(number))).first().id == number

    asyncio.run(run())


def test_asyncpg_transactions_and_savepoints() -> None:
    async def run() -> None:
        async with an_async_session() as session:
            async with session.begin():
                session.add(Article(id=1001, title="new", section_id=1, embedding=embedding(1001)))
                await session.flush()
                savepoint = await session.begin_nested()
                with pytest.raises(IntegrityError):
                    await session.execute(insert(Section).values(id=98, name="section 1"))
                await savepoint.rollback()
                assert (await session.scalars(nearest(1001, 1))).one().id == 1001
            await session.delete(await session.get_one(Article, 1001))
            await session.commit()

    asyncio.run(run())


def test_asyncpg_streams() -> None:
    async def run() -> None:
        async with an_async_session() as session:
            stream = await session.stream_scalars(select(Article.id).order_by(Article.id))
            assert [number async for number in stream] == list(range(COUNT))
            near = await session.stream_scalars(nearest(8, 20))
            assert (await near.first()).id == 8

    asyncio.run(run())


def test_asyncpg_concurrent_sessions() -> None:
    async def one(engine: object, number: int) -> int:
        async with AsyncSession(engine) as session:
            return (await session.scalars(nearest(number, 1))).one().id

    async def run() -> None:
        engine = create_async_engine(f"postgresql+asyncpg://{ADDRESS}", pool_size=5)
        assert await asyncio.gather(*(one(engine, number) for number in range(100))) == list(range(100))
        await engine.dispose()

    asyncio.run(run())


def test_asyncpg_cancelled_in_the_middle() -> None:
    async def run() -> None:
        async with an_async_session() as session:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(session.execute(text("SELECT pg_sleep(20)")), 0.3)
        async with an_async_session() as session:
            assert (await session.scalars(nearest(4, 1))).one().id == 4

    asyncio.run(run())
