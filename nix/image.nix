# SPDX-License-Identifier: MIT OR Apache-2.0
# A layered image that serves the models inside it and never asks the hub.
{
  lib,
  dockerTools,
  runCommand,
  embedding-server,
  models,
  served ? [ "all-MiniLM-L6-v2" ],
}:
let
  folder = runCommand "models" { } ''
    mkdir -p "$out/models"
    ${lib.concatMapStringsSep "\n" (
      name: ''ln -s ${models.${name}}/${name} "$out/models/"''
    ) served}
  '';
in
dockerTools.buildLayeredImage {
  name = "embedding-server";
  tag = embedding-server.version;
  contents = [ folder ];
  # With --workers the metrics are shared in files.
  extraCommands = "mkdir -m 1777 tmp";
  config = {
    Entrypoint = [ (lib.getExe embedding-server) ];
    Cmd = [ "serve" ];
    Env = [
      "EMBEDDING_SERVER_HOST=0.0.0.0"
      "EMBEDDING_SERVER_PORT=5000"
      "EMBEDDING_SERVER_LOAD_MODELS_FROM=/models"
      "EMBEDDING_SERVER_MODEL=${builtins.concatStringsSep "," served}"
      "HF_HUB_OFFLINE=1"
    ];
    ExposedPorts."5000/tcp" = { };
    User = "65532:65532";
    StopSignal = "SIGTERM";
  };
}
