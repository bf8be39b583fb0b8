#!/bin/sh
# Makes the secrets that compose.yaml names: a password for each role, and the addresses with them.
# What is there already stays, so a second call changes nothing; remove the folder to begin anew.
#
# The folder is closed to others. The files in it are not: a container's own user reads them.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/secrets}
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"

password() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

digest() {
    printf %s "$(cat "$1")" | sha256sum | cut -d ' ' -f 1
}

write() {
    # Whole or not at all: a file half written would be taken for a secret.
    cat >"$1.part"
    chmod 644 "$1.part"
    mv "$1.part" "$1"
}

for role in admin worker producer reader; do
    for server in postgres valkey; do
        [ "$server-$role" != valkey-admin ] || continue
        file=$server-$role-password
        [ -s "$file" ] || password | write "$file"
    done
done

[ -s grafana-admin-password ] || password | write grafana-admin-password

# Addresses as the containers see them, and as programs on this machine do.
for role in admin worker producer reader; do
    case $role in admin | worker) host=postgres ;; *) host=localhost ;; esac
    case $role in admin) user=promptmill ;; *) user=promptmill_$role ;; esac
    printf 'postgresql://%s:%s@%s:5432/promptmill' "$user" "$(cat "postgres-$role-password")" \
        "$host" | write "$role-database-url"
done
for role in worker producer reader; do
    case $role in worker) host=valkey ;; *) host=localhost ;; esac
    printf 'redis://promptmill_%s:%s@%s:6379/0' "$role" "$(cat "valkey-$role-password")" "$host" \
        | write "$role-redis-url"
done

sed -e "s/@WORKER@/$(digest valkey-worker-password)/" \
    -e "s/@PRODUCER@/$(digest valkey-producer-password)/" \
    -e "s/@READER@/$(digest valkey-reader-password)/" \
    -e '/^#/d' -e '/^$/d' "$here/redis/users.acl" | write valkey-users.acl

echo "secrets are in $folder"
