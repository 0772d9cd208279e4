#!/usr/bin/env bash
# An MLflow server that asks for a password. All that it keeps, secrets included, lies in FOLDER:
#
#   cluster/mlflow-server.sh FOLDER [options of mlflow server, such as --port 5001]
#
# It needs mlflow[auth]. cluster/README.md says how a search logs in and how others reach it.
# MLFLOW_BACKEND_STORE_URI and MLFLOW_ARTIFACTS_DESTINATION put the runs elsewhere: in the
# environment, since options, with a database's password in them, are there for all to see.
set -euo pipefail
umask 077

mkdir -p "${1:?FOLDER is missing: cluster/mlflow-server.sh FOLDER}"
cd "$1"
shift
# Made on first use. MLflow takes the admin's from here only then: change it later in MLflow.
for name in admin_password secret_key; do
  [[ -s $name ]] || python3 -c 'import secrets; print(secrets.token_hex(32))' >"$name"
done
chmod 600 admin_password secret_key

MLFLOW_AUTH_ADMIN_USERNAME='admin'
MLFLOW_AUTH_ADMIN_PASSWORD=$(<admin_password)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(<secret_key)
MLFLOW_BACKEND_STORE_URI=${MLFLOW_BACKEND_STORE_URI:-sqlite:///$PWD/mlflow.db}
MLFLOW_ARTIFACTS_DESTINATION=${MLFLOW_ARTIFACTS_DESTINATION:-$PWD/artifacts}
export MLFLOW_AUTH_ADMIN_USERNAME MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_BACKEND_STORE_URI MLFLOW_ARTIFACTS_DESTINATION
# Else seven more processes wait for jobs of MLflow's that a search has no use for.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

# One worker: SQLite has one writer. Options that are given again override these.
exec mlflow server --app-name basic-auth --serve-artifacts --workers 1 \
  --host 127.0.0.1 --allowed-hosts 'localhost:*,127.0.0.1:*' "$@"
