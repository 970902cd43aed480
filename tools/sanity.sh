#!/usr/bin/env bash
# Runs ansible-test on the collection as it is built, with the tests that need no container and nothing from git.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
home=${RAYPLANE_HOME:-$HOME/.cache/rayplane}/sanity
tree=$home/ansible_collections
mkdir -p "$tree" "$home/.ansible/test/cache"
# One run at a time: checkouts share the folder.
exec 9>"$home/lock" && flock 9

# The collection as people install it, beside those that it imports from.
rm -rf "$home"/*.tar.gz "$tree/rayplane"
(cd "$root" && ansible-galaxy collection build --output-path "$home" >/dev/null)
(cd "$home" && ANSIBLE_COLLECTIONS_PATH=$home ansible-galaxy collection install ./*.tar.gz -p "$home" --offline --no-deps >/dev/null)
for collection in amazon community kubernetes; do
  ln -sfn "$(python -c 'import ansible_collections; print(list(ansible_collections.__path__)[0])')/$collection" "$tree/$collection"
done

# ansible-test would fetch pip from a site of its own; Python carries one.
printf 'import ensurepip\nensurepip.bootstrap(default_pip=True)\n' > "$home/.ansible/test/cache/get_pip_24_2.py"

# Not `import`: modules would have to load where PyYAML is missing. Preflight says so instead.
tests=(action-plugin-docs ansible-doc compile empty-init line-endings no-assert no-get-exception no-illegal-filenames no-smart-quotes
  replace-urlopen runtime-metadata shebang symlinks use-argspec-type-path use-compat-six validate-modules)
cd "$tree/rayplane/platform"
# The licence is Apache-2.0; redirections lead to the actions in_process*; a port-forward runs beside its module.
mkdir -p tests/sanity
{
  for file in plugins/{callback,inventory,lookup}/*.py plugins/modules/*; do echo "$file validate-modules:missing-gplv3-license"; done
  for file in plugins/action/in_process*.py; do echo "$file action-plugin-docs"; done
  echo "plugins/modules/openai_smoke.py validate-modules:use-run-command-not-popen"
} > "tests/sanity/ignore-$(ansible-test --version | sed -E 's/.* ([0-9]+\.[0-9]+)\..*/\1/').txt"
HOME=$home ansible-test sanity --python "$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" "${tests[@]/#/--test=}"
