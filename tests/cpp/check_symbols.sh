#!/bin/sh
# check_symbols.sh LEVEL OBJECT...: an object must not share code with those of other levels. A
# function outside its namespace that is merged at link time (W) could run instructions that the
# machine lacks, when a caller from a lower level meets it.
level=$1
shift
shared=$(nm -C "$@" | grep ' W ' | grep -v "$level")
[ -z "$shared" ] || { echo "shared by levels:"; echo "$shared"; exit 1; }
