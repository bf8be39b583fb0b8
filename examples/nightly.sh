#!/bin/sh
# A batch from cron. Every run goes on where a former one was interrupted, and answers that are
# there already cost nothing.
#
#   15 2 * * *  PROMPTMILL_REDIS_URL=… PROMPTMILL_DATABASE_URL=… /opt/etl/nightly.sh /data/questions.jsonl
set -eu

input=$1
output=${input%.jsonl}.answers.jsonl

status=0
promptmill batch run "$input" -o "$output" --errors "${input%.jsonl}.errors.jsonl" --resume || status=$?

case $status in
0) ;;
1) echo "nightly: some rows failed; see ${input%.jsonl}.errors.jsonl" >&2 ;;
*) echo "nightly: interrupted; the next run goes on from there" >&2 ;;
esac
exit "$status"
