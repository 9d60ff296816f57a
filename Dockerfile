# SPDX-License-Identifier: BSD-3-Clause
# The Benchmark environment on port 8000. Python is all it needs.
FROM python:3.13-slim

WORKDIR /app
# README.md is what /metadata shows.
COPY benchmark.py client.py server.py README.md ./

USER 1000
EXPOSE 8000
# Not urllib: it would ask $HTTP_PROXY for this very machine.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1:8000', timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
# In this form Python is process 1 and gets the SIGTERM of `docker stop` itself.
CMD ["python", "server.py", "--host", "0.0.0.0", "--port", "8000"]
