#!/usr/bin/env bash
# What the pipeline needs on Google Cloud: services, a bucket, a repository for the image, and a
# service account for the stages with exactly the rights that `make preflight` looks for. What is
# there already is left as it is, so it can be run again.
#
#     deploy/google_cloud.sh PROJECT REGION BUCKET REPOSITORY ACCOUNT [SECRET]
#
# ACCOUNT is the short name of the service account. SECRET, if given, is an existing secret with the
# Hugging Face token. SUBMITTER=user:… or serviceAccount:… names who submits runs; it is you by
# default. DRY_RUN=1 prints the commands that change something instead of running them.
set -euo pipefail

if (($# < 5 || $# > 6)); then
    echo "usage: $0 PROJECT REGION BUCKET REPOSITORY ACCOUNT [SECRET]" >&2
    exit 2
fi
project=$1 region=$2 bucket=gs://${3#gs://} repository=$4 secret=${6:-}
email=$5@${project}.iam.gserviceaccount.com
submitter=${SUBMITTER:-user:$(gcloud config get-value account 2>/dev/null)}
if [[ $submitter != *:*@* ]]; then
    echo "SUBMITTER=$submitter is no user:… or serviceAccount:…; run gcloud auth login, or give it" >&2
    exit 2
fi

change() {
    echo "gcloud $*"
    [[ ${DRY_RUN:-0} == 1 ]] || gcloud --quiet "$@" >/dev/null
}

there() {
    gcloud --quiet "$@" >/dev/null 2>&1
}

services=(aiplatform storage artifactregistry cloudbuild iam iamcredentials cloudresourcemanager)
services+=(serviceusage compute)
[[ -z $secret ]] || services+=(secretmanager)
change services enable "${services[@]/%/.googleapis.com}" --project="$project"

there storage buckets describe "$bucket" ||
    change storage buckets create "$bucket" --project="$project" --location="$region" \
        --uniform-bucket-level-access
there artifacts repositories describe "$repository" --project="$project" --location="$region" ||
    change artifacts repositories create "$repository" --project="$project" \
        --location="$region" --repository-format=docker
there iam service-accounts describe "$email" --project="$project" ||
    change iam service-accounts create "$5" --project="$project"

# The stages: read and write the artifacts, pull the image, start custom jobs as themselves
stages=serviceAccount:$email
change storage buckets add-iam-policy-binding "$bucket" --member="$stages" \
    --role=roles/storage.objectUser
change artifacts repositories add-iam-policy-binding "$repository" --project="$project" \
    --location="$region" --member="$stages" --role=roles/artifactregistry.reader
change projects add-iam-policy-binding "$project" --member="$stages" \
    --role=roles/aiplatform.user --condition=None
change iam service-accounts add-iam-policy-binding "$email" --project="$project" \
    --member="$stages" --role=roles/iam.serviceAccountUser
[[ -z $secret ]] ||
    change secrets add-iam-policy-binding "$secret" --project="$project" --member="$stages" \
        --role=roles/secretmanager.secretAccessor

# Who submits: create runs, and let them use the account of the stages
change projects add-iam-policy-binding "$project" --member="$submitter" \
    --role=roles/aiplatform.user --condition=None
change iam service-accounts add-iam-policy-binding "$email" --project="$project" \
    --member="$submitter" --role=roles/iam.serviceAccountUser

echo
echo "PROJECT=$project REGION=$region PIPELINE_ROOT=$bucket/runs SERVICE_ACCOUNT=$email"
echo "TRAINER_IMAGE=$region-docker.pkg.dev/$project/$repository/trainer:1"
