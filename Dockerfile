# Build: a compiler for the one dependency without a wheel (hnswlib), for any CPU of the architecture.
FROM python:3.13-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/ruvector-proxy
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY config config
COPY proxy proxy
COPY learning learning
COPY bench bench
ENV HNSWLIB_NO_NATIVE=1
RUN /opt/ruvector-proxy/bin/pip install --no-cache-dir .

# Run: no compiler, no root.
FROM python:3.13-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/ruvector-proxy --create-home ruvector-proxy
COPY --from=build /opt/ruvector-proxy /opt/ruvector-proxy
ENV PATH=/opt/ruvector-proxy/bin:$PATH \
    RUVECTOR_LISTEN_HOST=0.0.0.0 \
    RUVECTOR_ADMIN_HOST=0.0.0.0 \
    RUVECTOR_STORE_PATH=/var/lib/ruvector-proxy
USER 10001
WORKDIR /var/lib/ruvector-proxy
VOLUME /var/lib/ruvector-proxy
EXPOSE 6432 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ.get(\"RUVECTOR_ADMIN_PORT\", 9464)}/healthz')"]
ENTRYPOINT ["ruvector-proxy"]
CMD ["serve"]
