# SPDX-License-Identifier: MIT OR Apache-2.0
# A layered image that serves its own models and never connects to the hub.
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
  config = {
    Entrypoint = [ (lib.getExe embedding-server) ];
    Cmd = [ "serve" ];
    Env = [
      "EMBEDDING_SERVER_HOST=0.0.0.0"
      "EMBEDDING_SERVER_PORT=5000"
      "EMBEDDING_SERVER_LOAD_MODELS_FROM=/models"
      "EMBEDDING_SERVER_MODEL=${builtins.concatStringsSep "," served}"
      "HF_HUB_OFFLINE=1"
      # Writable also with a read-only root; --workers stores its counters there.
      "TMPDIR=/dev/shm"
    ];
    ExposedPorts."5000/tcp" = { };
    User = "65532:65532";
    StopSignal = "SIGTERM";
    Labels = {
      "org.opencontainers.image.title" = embedding-server.pname;
      "org.opencontainers.image.description" = embedding-server.meta.description;
      "org.opencontainers.image.licenses" = "MIT OR Apache-2.0";
      "org.opencontainers.image.version" = embedding-server.version;
    };
  };
}
