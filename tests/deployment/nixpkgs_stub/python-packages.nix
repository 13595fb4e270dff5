# SPDX-License-Identifier: MIT OR Apache-2.0
# Packages of nixpkgs' pkgs/development/python-modules that our requirements name, and of their
# extras those that we use. A new requirement is written here once it was seen there.
{
  atheris = [ ];
  fastapi = [ ];
  hatchling = [ ];
  httpie = [ ];
  httptools = [ ];
  httpx = [ ];
  huggingface-hub = [ ];
  hypercorn = [ ];
  hypothesis = [ ];
  mypy = [ ];
  numpy = [ ];
  onnx = [ ];
  onnxruntime = [ ];
  openai = [ ];
  opentelemetry-exporter-otlp-proto-http = [ ];
  opentelemetry-sdk = [ ];
  orjson = [ ];
  prometheus-client = [ ];
  pyarrow = [ ];
  pydantic = [ ];
  pytest = [ ];
  pytest-xdist = [ ];
  pyyaml = [ ];
  ray = [ "data" "serve" ];
  ruff = [ ];
  safetensors = [ ];
  schemathesis = [ ];
  sentence-transformers = [ ];
  tokenizers = [ ];
  torch = [ ];
  tqdm = [ ];
  transformers = [ ];
  uvicorn = [ ];
  uvloop = [ ];
}
