# dus-edge: what a person types. `make` alone lists the targets.
#
# Set-up happens inside the targets: a virtual environment in .venv, made once and again only when
# the requirements change. The main job needs no compiler; only what needs llama.cpp compiles it.

QUANT     ?= q4_k_m
BASE      ?= pico
DROP      ?=
OUT       ?= build
QUANTIZER ?= native
IMATRIX   ?=
FIT       ?=
LIKE      ?=
FEEDBACK  ?=
BITS      ?= 4
GROUP     ?=
TEXT      ?=
MINUTES   ?= 5
TRAIN     ?= all
TOKENS    ?= 32768
MODEL     ?= pico
DATA      ?= built-in
FILE      ?=
SUITE     ?= h6
DOCS      ?= 50
ROWS      ?=
PORT      ?= 8000

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Environments of loaders that cannot share ours; see interop/README.md.
AUTOGPTQ  := .venv-autogptq
GPTQMODEL := .venv-gptqmodel
MLX       := .venv-mlx
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# llama-cpp-python is compiled on the spot: leave out what is not used here, use every core.
LLAMA_BUILD := CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" CMAKE_GENERATOR=Ninja

# What a person sets reaches the shell through its environment and is quoted there: neither make nor
# the shell reads anything in it.
SET := QUANT BASE DROP OUT QUANTIZER IMATRIX FIT LIKE FEEDBACK BITS GROUP TEXT MINUTES TRAIN TOKENS MODEL DATA FILE SUITE DOCS ROWS PORT TESTS
$(foreach v,$(SET),$(eval override $(v) := $$(value $(v))))
export $(SET)
PLAN  := $${DROP:+--drop "$$DROP"}
GROUPED := $${GROUP:+--group-size "$$GROUP"}
# The words --text PATH for each path of TEXT, or for TEXT itself if that is one, as "$$@".
TEXTS := set -f; if [ -e "$$TEXT" ]; then set -- --text "$$TEXT"; \
  else set --; for t in $$TEXT; do set -- "$$@" --text "$$t"; done; fi

# What `make gguf` needs set up: ggml's quantizers come with llama-cpp-python, calibrating needs torch.
GGUF_STAMPS := $(VENV)/$(if $(filter ggml,$(QUANTIZER)),llama,run).stamp \
  $(if $(filter auto,$(IMATRIX))$(FIT)$(LIKE)$(FEEDBACK),$(VENV)/hf.stamp)
# A mix of types is chosen by text that runs through the model; a preset is not.
MIXED := $${FIT:+--fit "$$FIT"} $${LIKE:+--like "$$LIKE"}

# What a model is run by: llama.cpp, or transformers where FILE is a folder.
TALK_STAMPS := $(VENV)/$(if $(wildcard $(FILE)/config.json),hf,llama).stamp
TALK_FILE := "$${FILE:-$$OUT/solar-dus-$${QUANT\#\#*,}.gguf}"

.DEFAULT_GOAL := help
# Two pips must not write one environment at the same time.
.NOTPARALLEL:
.PHONY: help gguf gptq mlx imatrix sensitivity seam sweep heal sft dpo solar-instruct eval chat serve modelfiles upscale interop tables test fuzz torture lint bench bench-export clean

help: ## List the targets.
	@echo "Targets:"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' \
	  | while IFS='|' read -r name text; do printf '%-21s %s\n' "$$name" "$$text"; done
	@echo "Variables, as they are now:"
	@printf '  %-16s %s\n' \
	  "QUANT=$$QUANT" "Preset of gguf, or several: QUANT=q4_k_m,q8_0." \
	  "BASE=$$BASE" "Folder, hub id (org/name@rev), or the built-in pico." \
	  "DROP=$$DROP" "Layers to drop from each copy; empty: a quarter of them." \
	  "OUT=$$OUT" "Folder to write results to." \
	  "QUANTIZER=$$QUANTIZER" "Quantize with native, or llama.cpp's ggml, compiled once." \
	  "IMATRIX=$$IMATRIX" "Importance matrix of gguf: a file, or auto to collect it." \
	  "FIT=$$FIT" "Device whose memory gguf makes the best mix for." \
	  "LIKE=$$LIKE" "Preset whose size gguf makes the best mix of." \
	  "FEEDBACK=$$FEEDBACK" "Set it to 1 for gguf's error feedback: closer, slower made." \
	  "BITS=$$BITS" "Bits of gptq and mlx; empty: bench without gptq." \
	  "GROUP=$$GROUP" "Columns that share a scale; empty: gptq 128, mlx 64." \
	  "TEXT=$$TEXT" "Calibration text, files or folders; empty: built in." \
	  "TRAIN=$$TRAIN" "What learns in heal: all, copies, seam:8 or lora." \
	  "TOKENS=$$TOKENS" "Tokens that heal trains on." \
	  "MODEL=$$MODEL" "What sft and dpo tune: as BASE, or OUT/sft." \
	  "DATA=$$DATA" "Rows of sft and dpo: a .jsonl file, or built-in." \
	  "FILE=$$FILE" "What chat and serve run; empty: OUT's GGUF of QUANT." \
	  "SUITE=$$SUITE" "What eval asks: h6, ko, or tasks with commas between." \
	  "DOCS=$$DOCS" "Documents of each task that eval asks, or all." \
	  "ROWS=$$ROWS" "Folder of eval's rows; empty: the hub's data sets." \
	  "PORT=$$PORT" "Port of serve." \
	  "MINUTES=$$MINUTES" "Minutes for which fuzz tries what was never tried."

gguf: $(GGUF_STAMPS) ## Up-scale BASE to a GGUF: preset QUANT, or by FIT or LIKE.
	@$(TEXTS); [ -n "$$IMATRIX$$FIT$$LIKE$$FEEDBACK" ] || set --; \
	  [ -n "$$FIT$$LIKE" ] || set -- -q "$$QUANT" "$$@"; $(BIN)/dus-edge gguf $(PLAN) "$$@" \
	  $(MIXED) --quantizer "$$QUANTIZER" $${IMATRIX:+--imatrix "$$IMATRIX"} \
	  $${FEEDBACK:+--feedback} -o "$$OUT" --alias solar-dus --overwrite -- "$$BASE"

upscale: $(VENV)/run.stamp ## Up-scale BASE to a checkpoint folder, OUT/checkpoint.
	@$(BIN)/dus-edge upscale $(PLAN) -o "$$OUT/checkpoint" --overwrite -- "$$BASE"

gptq: $(VENV)/hf.stamp ## Up-scale BASE to a GPTQ checkpoint of BITS, OUT/gptq.
	@$(TEXTS); $(BIN)/dus-edge gptq $(PLAN) --bits "$$BITS" $(GROUPED) "$$@" \
	  -o "$$OUT/gptq" --overwrite -- "$$BASE"

mlx: $(VENV)/run.stamp ## Up-scale BASE to a folder for MLX on Macs, OUT/mlx.
	@$(BIN)/dus-edge mlx $(PLAN) --bits "$$BITS" $(GROUPED) -o "$$OUT/mlx" --overwrite -- "$$BASE"

imatrix: $(VENV)/hf.stamp ## Collect BASE's importance matrix, OUT/imatrix.gguf.
	@$(TEXTS); $(BIN)/dus-edge imatrix $(PLAN) "$$@" -o "$$OUT/imatrix.gguf" --overwrite -- "$$BASE"

sensitivity: $(VENV)/hf.stamp ## What types cost BASE's tensors: OUT/sensitivity.json.
	@$(TEXTS); $(BIN)/dus-edge sensitivity $(PLAN) $${IMATRIX:+--imatrix "$$IMATRIX"} "$$@" \
	  -o "$$OUT/sensitivity.json" --overwrite -- "$$BASE"

seam: $(VENV)/plots.stamp ## Measure BASE's layers, and the seams of DROP: OUT/seam.
	@$(TEXTS); $(BIN)/dus-edge seam $(PLAN) "$$@" -o "$$OUT/seam" --overwrite -- "$$BASE"

sweep: $(VENV)/plots.stamp ## Compare all plans of SOLAR's form for BASE, OUT/sweep.
	@$(TEXTS); $(BIN)/dus-edge sweep "$$@" -o "$$OUT/sweep" --overwrite -- "$$BASE"

# Without TEXT the built-in base is healed on what it knows, Python: the program's own sources.
heal: $(VENV)/hf.stamp ## Up-scale BASE and train it on TEXT for TOKENS, OUT/heal.
	@[ -n "$$TEXT" ] || TEXT="dus_edge/checkpoint dus_edge/export dus_edge/predict dus_edge/quant"; \
	  $(TEXTS); $(BIN)/dus-edge heal $(PLAN) --train "$$TRAIN" \
	  --tokens "$$TOKENS" --heldout-tokens 4096 --eval-every 4 "$$@" \
	  -o "$$OUT/heal" --overwrite -- "$$BASE"

sft: $(VENV)/train.stamp ## Tune MODEL on the dialogues in DATA, OUT/sft.
	@$(BIN)/dus-edge sft --data "$$DATA" -o "$$OUT/sft" --overwrite -- "$$MODEL"

dpo: $(VENV)/train.stamp ## Tune MODEL on the preferences in DATA, OUT/dpo.
	@$(BIN)/dus-edge dpo --data "$$DATA" -o "$$OUT/dpo" --overwrite -- "$$MODEL"

# On a CPU with the built-in base all of it takes minutes.
solar-instruct: $(VENV)/train.stamp ## Heal BASE, tune it twice, quantize it: a chat model.
	@$(MAKE) --no-print-directory heal
	@MODEL="$$OUT/heal" $(MAKE) --no-print-directory sft
	@MODEL="$$OUT/sft" $(MAKE) --no-print-directory dpo
	@$(BIN)/dus-edge gguf --no-upscale -q "$$QUANT" -o "$$OUT" --alias solar-dus --overwrite \
	  -- "$$OUT/dpo"
	@echo "  ollama create solar-dus-instruct -f modelfiles/solar-instruct"

eval: $(VENV)/eval.stamp ## Ask BASE, and what DROP makes of it, SUITE: OUT/eval.
	@$(BIN)/dus-edge eval $(PLAN) --suite "$$SUITE" --docs "$$DOCS" $${ROWS:+--data "$$ROWS"} \
	  -o "$$OUT/eval" --overwrite -- "$$BASE"

chat: $(TALK_STAMPS) ## Talk with FILE, a GGUF or a folder, in the terminal.
	@$(BIN)/dus-edge chat -- $(TALK_FILE)

serve: $(TALK_STAMPS) $(VENV)/serve.stamp ## Serve FILE by the OpenAI API on PORT.
	@$(BIN)/dus-edge serve --port "$$PORT" -- $(TALK_FILE)

interop: $(VENV)/hf.stamp $(AUTOGPTQ)/done.stamp $(GPTQMODEL)/done.stamp ## Load our GPTQ folders with auto-gptq and GPTQModel.
	@OMP_NUM_THREADS=1 interop/run.sh $(BIN) "$$OUT/interop" $(AUTOGPTQ) $(GPTQMODEL)

$(AUTOGPTQ)/done.stamp: interop/auto-gptq.txt interop/setup.sh
	@echo "Setting up auto-gptq (minutes, 1.5 GB)"
	@PYTHON="$(PYTHON)" interop/setup.sh auto-gptq $(AUTOGPTQ) && touch $@

$(GPTQMODEL)/done.stamp: interop/gptqmodel.txt interop/setup.sh
	@echo "Setting up GPTQModel (minutes, 6 GB)"
	@PYTHON="$(PYTHON)" interop/setup.sh gptqmodel $(GPTQMODEL) && touch $@

$(MLX)/done.stamp: interop/mlx.txt interop/setup.sh | $(VENV)/hf.stamp
	@echo "Setting up mlx-lm"
	@mkdir -p $(MLX) && PYTHON="$(BIN)/python" interop/setup.sh mlx $(MLX) && touch $@

modelfiles: $(VENV)/run.stamp ## Write modelfiles/ anew.
	@$(BIN)/dus-edge modelfile --tracked modelfiles

tables: $(VENV)/run.stamp ## Predict SOLAR on every device; write benchmarks/TABLES.md.
	@$(BIN)/dus-edge bench tables -o benchmarks --overwrite

# Files in order: sorted by their number of tests, the longest would start last.
test: $(VENV)/test.stamp $(MLX)/done.stamp ## Run the tests; they draw the same cases every time.
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $$TESTS

fuzz: $(VENV)/test.stamp ## Damaged files and new draws of properties, for MINUTES.
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py "$$MINUTES" -n auto

torture: $(VENV)/test.stamp ## Kill every exporting command at random moments (minutes).
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py

lint: $(VENV)/test.stamp ## Check style.
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(VENV)/llama.stamp $(if $(BITS),$(VENV)/hf.stamp) ## Measure BASE's files here; write benchmarks/TABLES.md.
	@$(TEXTS); $(BIN)/dus-edge bench all $(PLAN) --bits "$$BITS" $(GROUPED) "$$@" \
	  -o "$$OUT/bench" --overwrite -- "$$BASE"

bench-export: $(VENV)/test.stamp ## Measure the export itself (minutes, 20 GB of disk).
	@$(BIN)/python benchmarks/bench_export.py

clean: ## Remove results and caches; .venv stays.
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/run.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing"
	@$(BIN)/pip install -q -c constraints.txt setuptools
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/hf.stamp: $(VENV)/run.stamp
	@echo "Installing PyTorch and transformers"
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[hf]"
	@touch $@

$(VENV)/plots.stamp: $(VENV)/hf.stamp
	@echo "Installing matplotlib"
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[hf,plots]"
	@touch $@

$(VENV)/train.stamp: $(VENV)/hf.stamp
	@echo "Installing trl and peft"
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[train]"
	@touch $@

$(VENV)/llama.stamp: $(VENV)/run.stamp
	@echo "Compiling llama.cpp; the first time takes minutes"
	@$(BIN)/pip install -q -c constraints.txt scikit-build-core cmake ninja
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(LLAMA_BUILD) $(BIN)/pip install -q -c constraints.txt \
	  --no-build-isolation -e ".[llama]"
	@touch $@

$(VENV)/serve.stamp: $(VENV)/llama.stamp
	@echo "Installing what the server needs"
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[serve]"
	@touch $@

$(VENV)/eval.stamp: $(VENV)/llama.stamp
	@echo "Installing lm-evaluation-harness"
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[eval,plots]"
	@touch $@

$(VENV)/test.stamp: $(VENV)/llama.stamp
	@echo "Installing what the tests need"
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@
