#!/bin/sh
# Runs a command with the settings that lie in files: /run/secrets/PROMPTMILL_<NAME> becomes the
# variable PROMPTMILL_<NAME>, unless that is set already. So no password stands in compose.yaml,
# in an image, or in what `docker inspect` shows.
set -eu

for file in "${PROMPTMILL_SECRETS_DIR:-/run/secrets}"/PROMPTMILL_*; do
    [ -f "$file" ] || continue
    name=${file##*/}
    eval "known=\${$name+yes}"
    if [ -z "$known" ]; then
        value=$(cat "$file")
        export "$name=$value"
    fi
done
unset PROMPTMILL_SECRETS_DIR
exec "$@"
