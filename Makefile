# The entry points of the project; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export RAYPLANE_HOME ?= $(HOME)/.cache/rayplane
export PATH := $(CURDIR)/.venv/bin:$(RAYPLANE_HOME)/uv/bootstrap/bin:$(PATH)
# Unbuffered lines also where the output is a pipe: long steps report as they go.
export PYTHONUNBUFFERED := 1
# Containers often set it; every start of ansible-playbook would compile Ansible again.
unexport PYTHONDONTWRITEBYTECODE

INVENTORY ?= inventories/local
ARGS ?=

.PHONY: help bootstrap deploy plan verify drift cost destroy local-down test test-unit test-gateway test-aws test-platform lint format coverage bench bench-gateway soak-gateway locks clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  INVENTORY=inventories/prod chooses another environment (default: $(INVENTORY))."
	@echo "  ARGS='--tags rayservice' adds arguments to ansible-playbook; ARGS='-k keys' to pytest."

bootstrap: ## Install Ansible and the tools into .venv
	@tools/bootstrap.sh

deploy: bootstrap ## Deploy an environment, from nothing to a model that answers
	@ansible-playbook playbooks/deploy.yml -i $(INVENTORY) $(ARGS)

plan: bootstrap ## Show what deploy would change
	@ansible-playbook playbooks/deploy.yml -i $(INVENTORY) --check --diff $(ARGS)

verify: bootstrap ## Ask the deployed models and print how to reach them
	@ansible-playbook playbooks/verify.yml -i $(INVENTORY) $(ARGS)

drift: bootstrap ## Report what differs from what is declared
	@ansible-playbook playbooks/deploy.yml -i $(INVENTORY) --check --diff -e '{"drift_report": true}' $(ARGS)

cost: bootstrap ## Show what the clusters cost a month
	@ansible-playbook playbooks/cost.yml -i $(INVENTORY) $(ARGS)

destroy: bootstrap ## Remove what deploy made (data in buckets is kept)
	@ansible-playbook playbooks/destroy.yml -i $(INVENTORY) $(ARGS)

local-down: bootstrap ## Stop the local platform and leave the machine as it was (caches stay)
	@ansible-playbook playbooks/local_down.yml -i inventories/local $(ARGS)

test: bootstrap ## Run every test in phases, on the real local platform too
	@python tools/run_tests.py -- $(ARGS)

test-unit: bootstrap ## Run the tests of plugins, filters, templates and documents
test-gateway: bootstrap ## Run the gateway's tests
test-aws: bootstrap ## Run the cloud's roles against an AWS emulator
test-platform: bootstrap ## Run the deployment, its faults and its end on the real local platform (root)
test-unit test-gateway test-aws test-platform:
	@python tools/run_tests.py $(@:test-%=%) -- $(ARGS)

lint: bootstrap ## Lint Ansible, YAML, Python and shell
	@echo "==> ruff";         ruff check . && ruff format --check .
	@echo "==> mypy";         mypy
	@echo "==> shellcheck";   shellcheck tools/*.sh .ci/run
	@echo "==> yamllint";     yamllint --strict .
	@echo "==> ansible-lint"; ansible-lint --offline
	@echo "==> ansible-test"; tools/sanity.sh

coverage: bootstrap ## Run the gateway's tests and show what they reach (at least 90 %)
	@pytest tests/gateway --cov --cov-report=term --cov-fail-under=90 $(ARGS)

bench: bootstrap ## Time a rerun against `terraform plan`, side by side
	@python bench/rerun.py $(ARGS)

bench-gateway: bootstrap ## Time the gateway beside LiteLLM's proxy and vLLM's router
	@python bench/gateway.py $(ARGS)

soak-gateway: bootstrap ## Ten minutes of load on the gateway: does anything grow?
	@python bench/gateway_soak.py $(ARGS)

format: bootstrap ## Format the Python code
	@ruff check --fix . && ruff format .

UV_COMPILE := uv pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-header requirements.in -o requirements.txt
locks: bootstrap ## Pin anew what uv.lock and tools/*/requirements.in allow
	uv lock --upgrade
	cd $(CURDIR)/tools/go && $(UV_COMPILE)
	cd $(CURDIR)/tools/gateway && $(UV_COMPILE) --python-platform x86_64-manylinux_2_28
	cd $(CURDIR)/tools/model && $(UV_COMPILE) --no-deps
	cd $(CURDIR)/tools/services && $(UV_COMPILE) --python-platform x86_64-manylinux_2_28
	cd $(CURDIR)/tools/serve && $(UV_COMPILE) --python-platform x86_64-manylinux_2_28 --override overrides.txt

clean: ## Remove the caches too (after local-down)
	@if [ -e "$(RAYPLANE_HOME)/state" ]; then echo "error: the local platform is still there; run make local-down first" >&2; exit 1; fi
	rm -rf .venv .ansible .mypy_cache .pytest_cache .ruff_cache test-results
	if [ -d "$(RAYPLANE_HOME)/go/mod" ]; then chmod -R u+w "$(RAYPLANE_HOME)/go/mod"; fi
	rm -rf "$(RAYPLANE_HOME)"
