# SPDX-License-Identifier: MIT OR Apache-2.0
# A model of the catalog as `$out/NAME`. Fetching it is impure and the only step with network; its
# copy has a fixed hash and is an ordinary input.
{
  lib,
  runCommand,
  cacert,
  embedding-server,
}:
name: hash:
let
  pulled =
    runCommand "${name}-pulled"
      {
        __impure = true;
        nativeBuildInputs = [ embedding-server ];
        SSL_CERT_FILE = "${cacert}/etc/ssl/certs/ca-bundle.crt";
        impureEnvVars = lib.fetchers.proxyImpureEnvVars;
      }
      ''
        export HOME="$TMPDIR"
        embedding-server models pull ${name} --to "$out"
      '';
in
runCommand name
  {
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
    outputHash = hash;
  }
  ''
    cp -r ${pulled} "$out"
  ''
