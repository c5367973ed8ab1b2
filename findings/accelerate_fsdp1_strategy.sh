#!/usr/bin/env bash
# accelerate 1.15.0: with FSDP1, `fsdp_reshard_after_forward: SHARD_GRAD_OP` in a config file trains with FULL_SHARD.
#
# FSDP1 has two keys for the same thing. The code calls `fsdp_sharding_strategy` deprecated in favour of
# `fsdp_reshard_after_forward`, whose help names FSDP1's strategies, and TRL's own fsdp1.yaml uses the newer one. But with
# version 1 the plugin first gives the older key a value, FULL_SHARD if none is set, and reads the newer one only if the
# older one has none. So the newer key has no effect with FSDP1, whatever it says, and nothing warns: gathered weights
# are dropped after each forward pass and gathered again (ZeRO-3 in place of ZeRO-2).
#
# What one would expect: the key that is set counts, or an error. What helps: `fsdp_sharding_strategy`, or version 2,
# where `fsdp_reshard_after_forward: false` works.
#
# Output seen:
#   version 1, fsdp_reshard_after_forward: SHARD_GRAD_OP -> ShardingStrategy.FULL_SHARD
#   version 1, fsdp_sharding_strategy: SHARD_GRAD_OP     -> ShardingStrategy.SHARD_GRAD_OP
#   version 2, fsdp_reshard_after_forward: false         -> False
#
# Exit code 0: the behaviour is as described. Another one: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} accelerate==1.15.0 torch==2.13.0
cd "$folder"
cat >script.py <<'PY'
import os
from pathlib import Path

from accelerate import FullyShardedDataParallelPlugin

plugin = FullyShardedDataParallelPlugin()  # as Accelerator() makes it from what the launcher has exported
used = plugin.sharding_strategy if plugin.fsdp_version == 1 else plugin.reshard_after_forward
Path(f"used-{os.environ['RANK']}.txt").write_text(f"{used}\n")
PY
used() {
    cat >config.yaml <<YAML
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: $1
  fsdp_sync_module_states: false           # these two ask for a GPU
  fsdp_cpu_ram_efficient_loading: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  $2
mixed_precision: 'no'
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
YAML
    OMP_NUM_THREADS=1 "$folder/env/bin/accelerate" launch --config_file config.yaml script.py >log.txt 2>&1 ||
        { cat log.txt >&2; exit 1; }
    sort -u used-0.txt used-1.txt
    rm used-0.txt used-1.txt
}
newer=$(used 1 "fsdp_reshard_after_forward: SHARD_GRAD_OP")
older=$(used 1 "fsdp_sharding_strategy: SHARD_GRAD_OP")
second=$(used 2 "fsdp_reshard_after_forward: false")
echo "version 1, fsdp_reshard_after_forward: SHARD_GRAD_OP -> $newer"
echo "version 1, fsdp_sharding_strategy: SHARD_GRAD_OP     -> $older"
echo "version 2, fsdp_reshard_after_forward: false         -> $second"
[ "$newer" = ShardingStrategy.FULL_SHARD ] && [ "$older" = ShardingStrategy.SHARD_GRAD_OP ] && [ "$second" = False ] ||
    { echo "changed"; exit 1; }
echo "as described"
