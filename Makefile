# Two commands: `make demo` (the main job, end to end, on this machine) and `make test` (everything that tests run here).
# Both set up what they need themselves. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
LOCK   ?= requirements.lock
UV     ?= 0.13.9
PY     := $(VENV)/bin/python
DEMO   ?= demo_out
REAL   ?= real_out
CLAIMS ?= claims_out
GEOLOOM_DATA ?= ../shared/data
SITES  ?= 1500
STEPS  ?= 150
SEED   ?= 7
NWPU   = $(GEOLOOM_DATA)/labelled/nwpu_vhr10
L2A_BANDS = B01,B02,B03,B04,B05,B06,B07,B08,B8A,B09,B11,B12
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(VENV)/.complete ## virtual environment .venv with everything of requirements.txt (idempotent)

# The lock holds hashes: a file that is not the one that was locked is not installed. LOCK=requirements.txt takes what the index has
# (an index with builds of its own, such as CPU-only torch).
$(VENV)/.complete: requirements.lock requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed, $(PYTHON) is older; pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(PY) -m pip check
	touch $@

.PHONY: lock
lock: ## requirements.lock anew from requirements.txt: every version and hash, for all platforms (after a change of a requirement)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv-lock uv==$(UV)
	cp requirements.lock requirements.lock.new  # what stands there stays, where requirements.txt allows it
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header -o requirements.lock.new requirements.txt
	{ echo "# Every package that requirements.txt leads to, on any platform, with the hashes of its files. Made by \`make lock\`; do not edit."; \
	  cat requirements.lock.new; } > requirements.lock && rm requirements.lock.new

.PHONY: system-deps
system-deps: ## apt packages of the real servers that integration tests start: SLURM, PostgreSQL with PostGIS, Chromium
	@run() { if [ "$$(id -u)" = 0 ]; then "$$@"; else sudo "$$@"; fi; }; \
	missing=(); \
	command -v slurmctld >/dev/null || missing+=(slurmctld slurmd slurm-client); \
	command -v munged >/dev/null || missing+=(munge); \
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing+=(postgresql); \
	ls /usr/share/postgresql/*/extension/postgis.control >/dev/null 2>&1 || missing+=(postgresql-15-postgis-3); \
	command -v chromium >/dev/null || missing+=(chromium); \
	if [ $${#missing[@]} -gt 0 ]; then export DEBIAN_FRONTEND=noninteractive; run apt-get update -qq; run apt-get install -y -qq --no-install-recommends "$${missing[@]}"; fi; \
	echo "system-deps: complete"

.PHONY: demo
demo: setup ## scenes -> shards -> 2-process ZeRO-2 + expert-parallel pretraining -> MLflow -> comparison (6 to 8 minutes, 2 cores)
	rm -rf $(DEMO)
	$(PY) -m data_prep simulate $(DEMO)/scenes --sites $(SITES) --side-m 120 --seed $(SEED)
	$(PY) -m data_prep build data_prep/runs/demo.yaml source.catalog=[$(DEMO)/scenes/catalog.parquet] output.url=$(DEMO)/shards
	$(PY) -m data_prep verify $(DEMO)/shards
	$(PY) -m data_prep show $(DEMO)/shards --out $(DEMO)/sheet.png
	$(PY) -m pipeline train pipeline/runs/demo.yaml --processes 2 data.url=$(DEMO)/shards run.dir=$(DEMO)/moe train.steps=$(STEPS) train.seed=$(SEED) tracking.uri=sqlite:///$(abspath $(DEMO))/mlflow.db
	$(PY) -m pipeline probe $(DEMO)/moe
	$(PY) -m pipeline train pipeline/runs/demo_dense.yaml --processes 2 data.url=$(DEMO)/shards run.dir=$(DEMO)/dense train.steps=$(STEPS) train.seed=$(SEED) tracking.uri=sqlite:///$(abspath $(DEMO))/mlflow.db
	$(PY) -m pipeline compare $(DEMO)/moe $(DEMO)/dense --out $(DEMO)/compare.html
	$(PY) -m pipeline tour $(DEMO)/moe $(DEMO)/dense --sheet $(DEMO)/sheet.png --out $(DEMO)/tour.html
	@echo
	@echo "Look at it:   tour  $(DEMO)/tour.html     comparison  $(DEMO)/compare.html     contact sheet  $(DEMO)/sheet.png"
	@echo "MLflow:       $(VENV)/bin/mlflow server --backend-store-uri sqlite:///$(abspath $(DEMO))/mlflow.db --port 5000   then open http://127.0.0.1:5000"

.PHONY: claims
claims: setup ## the paper's five claims over 3 seeds, one table with verdicts: 30 runs, 4 to 6 hours on 2 cores; the same command continues
	[ -f $(CLAIMS)/shards/manifest.json ] || { $(PY) -m data_prep simulate $(CLAIMS)/scenes --sites $(SITES) --side-m 120 --seed $(SEED) && \
	  $(PY) -m data_prep build data_prep/runs/demo.yaml source.catalog=[$(CLAIMS)/scenes/catalog.parquet] output.url=$(CLAIMS)/shards; }
	$(PY) -m pipeline ablate pipeline/runs/demo_paper.yaml data.url=$(CLAIMS)/shards run.dir=$(CLAIMS)/runs tracking.uri=none parallel.ep=1 --claims --seeds 3 --processes 2

.PHONY: real-ground
real-ground: setup ## shard sets of real patches from $GEOLOOM_DATA for pipeline/runs/real_{s2,hr}.yaml: s2 tiles, aerial images, EuroSAT RGB
	@[ -d "$(GEOLOOM_DATA)/unlabelled" ] && [ -d "$(GEOLOOM_DATA)/labelled" ] || { echo "real-ground: $(GEOLOOM_DATA) holds no unlabelled/ and labelled/; set GEOLOOM_DATA to the folder of real imagery" >&2; exit 1; }
	rm -rf $(REAL)/s2 $(REAL)/hr $(REAL)/eurosat && mkdir -p $(REAL)/s2 $(REAL)/hr $(REAL)/eurosat
	$(PY) -m data_prep catalog $(GEOLOOM_DATA)/unlabelled $(REAL)/s2/catalog.parquet --layout patches --sensor s2 --unit dn --gsd 10 --bands $(L2A_BANDS)
	$(PY) -m data_prep build data_prep/runs/real_s2.yaml source.catalog=[$(REAL)/s2/catalog.parquet] output.url=$(REAL)/s2/shards
	$(PY) -c 'import json; print(*sorted(i["file_name"] for i in json.load(open("$(NWPU)/instances_train2017.json"))["images"]), sep="\n")' > $(REAL)/hr/nwpu_train.txt
	$(PY) -m data_prep catalog $(GEOLOOM_DATA)/labelled/ucmerced $(REAL)/hr/ucmerced.parquet --layout patches --sensor hr --unit uint8 --gsd 0.3
	$(PY) -m data_prep catalog "$(NWPU)/positive image set" $(REAL)/hr/nwpu.parquet --layout patches --sensor hr --unit uint8 --gsd 0.5 --files $(REAL)/hr/nwpu_train.txt
	$(PY) -m data_prep build data_prep/runs/real_hr.yaml source.catalog=[$(REAL)/hr/ucmerced.parquet,$(REAL)/hr/nwpu.parquet] output.url=$(REAL)/hr/shards
	$(PY) -m data_prep catalog $(GEOLOOM_DATA)/labelled/eurosat_rgb/2750 $(REAL)/eurosat/catalog.parquet --layout patches --sensor hr --unit uint8 --gsd 10
	$(PY) -m data_prep build data_prep/runs/real_hr.yaml grid.tile=false grid.side_m=null source.catalog=[$(REAL)/eurosat/catalog.parquet] output.url=$(REAL)/eurosat/shards
	for set in s2 hr eurosat; do $(PY) -m data_prep verify $(REAL)/$$set/shards; done

.PHONY: schema
schema: setup ## JSON schemas of the configs, for editors, written anew beside them
	$(PY) -m pipeline schema train --out pipeline/runs/schema.json
	$(PY) -m pipeline schema build --out data_prep/runs/schema.json

.PHONY: golden
golden: setup ## losses of a small model written anew as files with their provenance (tests/golden); CI holds later code to them
	$(PY) -m tests.golden

.PHONY: check
check: setup ## format, lint, types, imports, unit tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) -m pytest tests/unit -n 2

.PHONY: test
test: check ## all tests that run on this machine: check, then the integration tier
	$(PY) -m pytest tests/integration -n 2 --dist loadfile

.PHONY: references
references: setup ## metrics and file formats of `evaluate` against torchmetrics, pycocotools and tacoreader, which only these tests need
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-evaluate.txt
	$(PY) -m pip check
	GEOLOOM_REQUIRE_ALL=1 $(PY) -m pytest tests/unit/test_evaluate_metrics.py tests/unit/test_evaluate_readers.py

.PHONY: faults
faults: setup ## the whole fault campaign, goes on after a kill: its table in faults_out/table.md, exit 1 if anything is lost, doubled, wrong or hangs
	$(PY) -m tests.faults --side-by-side --keep faults_out/kept --out faults_out/table.md
	GEOLOOM_KILLS=20 $(PY) -m pytest tests/integration/test_kill.py tests/integration/test_fenced.py tests/integration/test_canaries.py

.PHONY: properties
properties: setup ## property tests and fuzzing with other random examples than CI's, 400 of each
	GEOLOOM_PROPERTIES=random $(PY) -m pytest tests/unit -n 2

.PHONY: licences
licences: setup ## what is installed, which version, under which licence
	@$(PY) -m tests.licences

.PHONY: bench
bench: setup ## benchmarks, ratios side by side, written to bench_out/report.txt
	mkdir -p bench_out
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-bench -r pipeline/bench/requirements.txt
	[ -d bench_out/shards ] || { $(PY) -m data_prep simulate bench_out/scenes --sites 48 && \
	  $(PY) -m data_prep build data_prep/runs/demo.yaml source.catalog=[bench_out/scenes/catalog.parquet] output.url=bench_out/shards; }
	{ $(PY) -m data_prep bench build; \
	  $(PY) -m data_prep bench codec || echo "codec: needs the real imagery (GEOLOOM_DATA)"; \
	  $(PY) -m pipeline bench loader; \
	  $(PY) -m pipeline bench moe; \
	  $(PY) -m pipeline bench step pipeline/runs/demo.yaml data.url=bench_out/shards; \
	  $(PY) -m pipeline bench checkpoint pipeline/runs/tiny.yaml; \
	  $(PY) -m pipeline bench tracking; } | tee bench_out/report.txt

.PHONY: gpu
gpu: $(if $(GPU_PY),,setup) ## what only a GPU can show: its tests and benchmarks, one report in gpu_out; without one it says so (GPU_PY=python3: no set-up)
	$(or $(GPU_PY),$(PY)) -m pipeline bench gpu --out gpu_out

.PHONY: format
format: setup ## rewrite formatting
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

.PHONY: clean
clean: ## remove what demo and bench wrote
	rm -rf $(DEMO) bench_out faults_out gpu_out
