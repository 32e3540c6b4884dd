#!/bin/sh
# What a GPU is asked first, the most telling things first, in under ten minutes; results go to FOLDER:
#   sh benchmarks/first_gpu.sh FOLDER [--wheels FOLDER] [--device cpu --tiny]
exec "${PYTHON:-python3}" "$(dirname "$0")/first_gpu.py" "$@"
