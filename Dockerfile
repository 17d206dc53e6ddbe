# Serving only: no torch, no compiler, no build cache, not root.
#
#   docker build -t embedserve .
#   docker run -p 8000:8000 -v embedserve:/data -e EMBEDSERVE_API_KEY=secret embedserve
#
# The container listens on all of its addresses, so it needs a key (or EMBEDSERVE_NO_AUTH=true where something
# in front of it asks for one).

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY embedserve embedserve
COPY indexes indexes
COPY training training
RUN python -m venv /opt/embedserve \
 && /opt/embedserve/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt . \
 && ! /opt/embedserve/bin/python -c "import torch" 2>/dev/null \
 && /opt/embedserve/bin/embedserve check starter \
 && /opt/embedserve/bin/pip uninstall --yes pip

FROM python:3.13-slim
RUN useradd --system --uid 10001 --create-home embedserve && install -d -o embedserve /data
COPY --from=build /opt/embedserve /opt/embedserve
ENV PATH=/opt/embedserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    EMBEDSERVE_HOST=0.0.0.0 \
    EMBEDSERVE_PORT=8000 \
    EMBEDSERVE_DATA=/data
USER embedserve
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"EMBEDSERVE_PORT\"]}/readyz', timeout=4)"]
ENTRYPOINT ["embedserve"]
CMD ["serve"]
