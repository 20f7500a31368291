# The reference's parameter names, shared by the eval.sh and train_selector.sh of every family.
#
# A family's script sets its defaults as shell variables, calls `read_options "$@"` and then has the
# caller's values in the same variables. Sourced by bash with `set -euo pipefail`.

# usage SCRIPT: what every script says to --help; the variables named in OPTIONS with their values.
usage() {
  echo "Usage: $1 [--print] [name=value ...]"
  echo "$ABOUT"
  echo
  echo "Names and their values unless given:"
  local name
  for name in $OPTIONS; do printf '  %-24s %s\n' "$name" "${!name:-(none)}"; done
  echo
  echo "--print shows the command instead of running it."
}

# read_options ARGS: take name=value for the names in OPTIONS; anything else is an error.
read_options() {
  PRINT=no
  local argument name
  for argument in "$@"; do
    case "$argument" in
      --help | -h) usage "$0"; exit 0 ;;
      --print) PRINT=yes ;;
      *=*)
        name=${argument%%=*}
        if [[ " $OPTIONS " != *" $name "* ]]; then
          echo "$0: unknown name '$name'; known: $OPTIONS" >&2
          exit 2
        fi
        printf -v "$name" '%s' "${argument#*=}"
        ;;
      *) echo "$0: expected name=value, got '$argument'; see $0 --help" >&2; exit 2 ;;
    esac
  done
}

# run FOLDER COMMAND: run it, or print it with --print. FOLDER is the part of the house it needs.
run() {
  local folder=$1
  shift
  if [[ $PRINT == yes ]]; then
    printf '%q ' "$@"
    echo
  elif [[ ! -d $folder ]]; then
    echo "$0: this version has no $folder yet, so it cannot run; --print shows the command." >&2
    exit 1
  else
    exec "$@"
  fi
}

# evaluate PLUGIN EXTRA: run lmms-eval's plug-in of a family with the variables of its eval.sh.
# Started again after an interruption, it goes on with what is left. The harness exits honestly only
# with --verbosity DEBUG.
evaluate() {
  local arguments="pretrained=$pretrained,use_token_selector=$use_token_selector"
  if [[ $use_token_selector == True ]]; then
    arguments+=",token_selector_path=$token_selector_path,drop_func_name=$drop_func_name"
    arguments+=",tkn_budget=$tkn_budget,token_selector_layer=$token_selector_layer"
    [[ -z $token_selector_type ]] || arguments+=",token_selector_type=$token_selector_type"
  fi
  # What `make install` has set up is used without being activated.
  [[ ! -d .venv/bin ]] || PATH=$PWD/.venv/bin:$PATH
  arguments+=",$2,run_folder=$output_path/answers"
  run evaluation accelerate launch --num_processes "$gpus" -m lmms_eval --model "$1" \
    --model_args "$arguments" --tasks "$tasks" --batch_size 1 --include_path evaluation/tasks \
    --output_path "$output_path" --log_samples --verbosity DEBUG
}
