"""A small application on Django and pgvector-python, as its own test.

Run by pytest in an environment of its own (see ``tests/conformance/orm.py``); the server comes from libpq's
variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import django
import pytest
from django.conf import settings

_DATABASE = {
    "ENGINE": "django.db.backends.postgresql",
    "HOST": os.environ["PGHOST"],
    "PORT": os.environ["PGPORT"],
    "USER": os.environ["PGUSER"],
    "NAME": os.environ["PGDATABASE"],
}
settings.configure(
    DATABASES={
        "default": _DATABASE,
        "binding": {**_DATABASE, "OPTIONS": {"server_side_binding": True}},
    },
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
)
django.setup()

from django.db import IntegrityError, connections, models, transaction  # noqa: E402  only once set up
from django.db.models import Avg, Count  # noqa: E402
from pgvector.django import CosineDistance, HnswIndex, L2Distance, VectorField  # noqa: E402

COUNT = 300


class Section(models.Model):
    name = models.CharField(max_length=40, unique=True)

    class Meta:
        app_label = "conformance"


class Article(models.Model):
    title = models.CharField(max_length=80)
    section = models.ForeignKey(Section, on_delete=models.CASCADE)
    embedding = VectorField(dimensions=3)

    class Meta:
        app_label = "conformance"
        indexes = (HnswIndex(name="article_embedding", fields=["embedding"], opclasses=["vector_l2_ops"]),)


def embedding(number: float) -> list[float]:
    return [float(number), number / 2, 1.0]


def nearest(number: float, using: str):
    return Article.objects.using(using).order_by(L2Distance("embedding", embedding(number)))


@pytest.fixture(scope="module", autouse=True)
def _schema() -> Iterator[None]:
    with connections["default"].schema_editor() as editor:
        editor.create_model(Section)
        editor.create_model(Article)
    sections = Section.objects.bulk_create([Section(id=i, name=f"section {i}") for i in range(4)])
    Article.objects.bulk_create(
        [
            Article(id=i, title=f"article {i}", section=sections[i % 4], embedding=embedding(i))
            for i in range(COUNT)
        ]
    )
    yield
    with connections["default"].schema_editor() as editor:
        editor.delete_model(Article)
        editor.delete_model(Section)
    connections.close_all()


@pytest.fixture(params=["default", "binding"])
def using(request: pytest.FixtureRequest) -> Iterator[str]:
    """Bind parameters in the client (Django's default) or on the server."""
    yield request.param
    connections[request.param].close()


def test_nearest_neighbours(using: str) -> None:
    for number in range(0, COUNT, 17):
        found = list(nearest(number, using)[:5])
        assert found[0].id == number
        assert len(found) == 5


def test_filters_annotations_and_joins(using: str) -> None:
    query = (
        Article.objects.using(using)
        .filter(section__name="section 3")
        .select_related("section")
        .annotate(distance=CosineDistance("embedding", embedding(7)))
        .order_by("distance")[:3]
    )
    found = list(query)
    assert found[0].id == 7
    assert found[0].distance == pytest.approx(0, abs=1e-6)
    assert {article.section.name for article in found} == {"section 3"}


def test_offsets_and_slices(using: str) -> None:
    ids = list(nearest(50.2, using).values_list("id", flat=True)[:20])
    assert ids[0] == 50
    assert list(nearest(50.2, using).values_list("id", flat=True)[:10]) == ids[:10]


def test_transactions_and_savepoints(using: str) -> None:
    with transaction.atomic(using=using):
        Article.objects.using(using).create(id=1000, title="new", section_id=1, embedding=embedding(1000))
        with pytest.raises(IntegrityError), transaction.atomic(using=using):
            Section.objects.using(using).create(name="section 1")
        assert nearest(1000, using).first().title == "new"
        transaction.set_rollback(True, using=using)
    assert nearest(1000, using).first().id == COUNT - 1


def test_rows_locked_for_update(using: str) -> None:
    with transaction.atomic(using=using):
        article = Article.objects.using(using).select_for_update().get(id=5)
        assert nearest(5, using).first() == article
        article.title = "locked"
        article.save(using=using)
    assert Article.objects.using(using).get(id=5).title == "locked"
    Article.objects.using(using).filter(id=5).update(title="article 5")


def test_an_iterator_over_a_server_side_cursor(using: str) -> None:
    with transaction.atomic(using=using):
        numbers = []
        for article in Article.objects.using(using).order_by("id").iterator(chunk_size=25):
            numbers.append(article.id)
            if article.id % 100 == 0:
                assert nearest(article.id, using).first().id == article.id
        assert numbers == list(range(COUNT))
        assert next(nearest(60, using).iterator(chunk_size=10)).id == 60


def test_aggregates_and_raw_sql(using: str) -> None:
    counted = (
        Article.objects.using(using).values("section__name").annotate(n=Count("id")).order_by("section__name")
    )
    assert [row["n"] for row in counted] == [75] * 4
    average = Article.objects.using(using).aggregate(average=Avg("embedding"))["average"]
    assert list(average) == pytest.approx(embedding((COUNT - 1) / 2))
    raw = "SELECT * FROM conformance_article ORDER BY embedding <-> %s::vector LIMIT 1"
    assert Article.objects.using(using).raw(raw, ["[44,22,1]"])[0].id == 44


def test_settings_of_the_application(using: str) -> None:
    with connections[using].cursor() as cursor, transaction.atomic(using=using):
        cursor.execute("SET LOCAL hnsw.ef_search = 33")
        assert nearest(6, using).first().id == 6
        cursor.execute("SHOW hnsw.ef_search")
        assert cursor.fetchone() == ("33",)


def test_a_connection_that_was_closed(using: str) -> None:
    assert nearest(1, using).first().id == 1
    connections[using].close()
    assert nearest(2, using).first().id == 2
