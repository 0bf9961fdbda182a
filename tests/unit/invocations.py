"""The table of wrong invocations: what each must be told."""

NEEDED = "--hf-model {hf} --train-iters 10 --lr 1e-4 --seq-length 32 --mock-data --init-from-scratch"
"""A command line that is right; an invocation adds to it, and what is said last wins."""

DATA = "--no-mock-data --eval-iters 0"
SFT = "--no-mock-data --sft"
LOAD = "--no-init-from-scratch"
PP2 = "--pipeline-model-parallel-size 2"

WRONG: dict[str, tuple[int, str, tuple[str, ...]]] = {
    # what is wrong: (number of processes, what is added to NEEDED, (flag, what was found, what to do))
    # ---- names
    "short name": (2, "--tp 2", ("--tp", "did you mean --tensor-model-parallel-size?")),
    "name of another trainer": (1, "--learning-rate 1e-5", ("--learning-rate", "did you mean --lr?")),
    "half a name": (
        1,
        "--tensor-parallel-size 2",
        ("--tensor-parallel-size", "did you mean --tensor-model-parallel-size?"),
    ),
    "underscores": (1, "--micro_batch_size 2", ("--micro_batch_size", "did you mean --micro-batch-size?")),
    "misspelt": (1, "--seq-lenght 32", ("--seq-lenght", "did you mean --seq-length?")),
    "misspelt with value": (1, "--trian-iters=10", ("--trian-iters", "did you mean --train-iters?")),
    "torchrun's flag": (1, "--nproc-per-node 8", ("--nproc-per-node", "torchrun's", "before pretrain_hy.py")),
    "no such thing": (1, "--xyzzy 1", ("--xyzzy", "--help lists all flags")),
    "one dash": (1, "-lr 1", ("-lr", "--help lists all flags")),
    "stray word": (1, "--lr 1e-4 recipe.yaml", ("'recipe.yaml'", "--config FILE.yaml")),
    "removed from Megatron": (1, "--batch-size 4", ("--batch-size 4", "--micro-batch-size and --global-batch-size")),
    "removed switch": (1, "--checkpoint-activations", ("--checkpoint-activations", "--recompute-granularity")),
    "ignored by Megatron": (
        1,
        "--rampup-batch-size 2 2 100",
        ("--rampup-batch-size 2 2 100", "--step-batch-size-schedule"),
    ),
    "Megatron's own YAML": (1, "--yaml-cfg {file}", ("--yaml-cfg", "--config FILE.yaml")),
    "no recipe": (1, "--config {tmp}/none.yaml", ("--config {tmp}/none.yaml", "No such file", "give a YAML file")),
    # ---- values
    "value for a switch": (1, "--bf16 true", ("--bf16", "found 'true'", "--no-bf16 to undo")),
    "value for a switch with =": (1, "--bf16=true", ("--bf16", "found 'true'", "write --bf16 alone")),
    "no value": (1, "--lr --bf16", ("--lr", "found none", "write it after --lr")),
    "word for a number": (1, "--lr fast", ("--lr fast", "a number such as 1e-5")),
    "number in the wrong form": (1, "--train-iters 1e4", ("--train-iters 1e4", "a whole number")),
    "no such choice": (1, "--lr-decay-style cosin", ("--lr-decay-style", "'cosin'", "'cosine'")),
    "no such backend": (1, "--attention-backend flash2", ("--attention-backend flash2", "one of flash, fused")),
    "two precisions": (1, "--bf16 --no-fp16 --fp16", ("--fp16", "--bf16", "")),
    # ---- architecture
    "other experts": (1, "--num-experts 64", ("--num-experts 64", "says 8", "leave --num-experts out")),
    "other layers": (1, "--num-layers 12", ("--num-layers 12", "says 4", "leave --num-layers out")),
    "other top-k": (1, "--moe-router-topk 9", ("--moe-router-topk 9", "says 2", "leave --moe-router-topk out")),
    "other vocabulary": (1, "--vocab-size 32000", ("--vocab-size 32000", "says 1024", "leave --vocab-size out")),
    "other tokenizer": (
        1,
        "--tokenizer-type NullTokenizer",
        ("--tokenizer-type NullTokenizer", "says HuggingFaceTokenizer", "out"),
    ),
    "MTP that is not there": (
        1,
        "--mtp-num-layers 1",
        ("--mtp-num-layers 1", "says none", "leave --mtp-num-layers out"),
    ),
    "switch against it": (
        1,
        "--no-qk-layernorm",
        ("--no-qk-layernorm", "says the opposite", "leave --no-qk-layernorm out"),
    ),
    "another model": (1, "--window-size 128,0", ("--window-size 128 0", "another model", "leave --window-size out")),
    "another rotary embedding": (
        1,
        "--rotary-interleaved",
        ("--rotary-interleaved", "another model", "leave --rotary-interleaved out"),
    ),
    "from the checkpoint": (
        1,
        "--use-checkpoint-args",
        ("--use-checkpoint-args", "config.json", "leave --use-checkpoint-args out"),
    ),
    "positions reset": (
        1,
        "--reset-position-ids",
        ("--reset-position-ids", "would change nothing", "leave --reset-position-ids out"),
    ),
    # ---- the model's folder
    "no folder": (1, "--hf-model {tmp}/hff", ("--hf-model {tmp}/hff", "no such folder", "hf download")),
    "a name on the hub": (
        1,
        "--hf-model tencent/Hy-MT2-30B-A3B",
        ("--hf-model tencent/Hy-MT2-30B-A3B", "no such folder", "hf download"),
    ),
    "empty model folder": (1, "--hf-model {empty}", ("--hf-model {empty}/config.json", "No such file")),
    "config.json broken": (
        1,
        "--hf-model {bad_json}",
        ("--hf-model {bad_json}/config.json", "line 2, column 16", "not valid JSON"),
    ),
    "config.json wrong": (
        1,
        "--hf-model {bad_field}",
        ("--hf-model {bad_field}/config.json", "num_experts is 'eight'", "a positive integer is needed"),
    ),
    "other family": (
        1,
        "--hf-model {other_family}",
        ("--hf-model {other_family}/config.json", "'qwen3_moe'", '"hy_v3"'),
    ),
    "no tokenizer": (1, "--hf-model {no_tokenizer}", ("--hf-model {no_tokenizer}/tokenizer.json", "missing", "needed")),
    "tokenizer broken": (1, "--hf-model {bad_tokenizer}", ("--hf-model {bad_tokenizer}", "cannot be loaded")),
    "tokenizer too large": (
        1,
        "--hf-model {small_vocabulary}",
        ("--hf-model {small_vocabulary}", "outside the model's vocabulary", "(512)"),
    ),
    # ---- layout
    "TP without processes": (
        1,
        "--tensor-model-parallel-size 2",
        ("--tensor-model-parallel-size 2", "1 process of", "start 2 "),
    ),
    "world no multiple": (
        6,
        f"--tensor-model-parallel-size 2 {PP2}",
        ("x --pipeline-model-parallel-size 2 = 4", "6 processes", "start 4 or 8"),
    ),
    "TP against heads": (
        3,
        "--tensor-model-parallel-size 3",
        ("--tensor-model-parallel-size 3", "8 attention heads", "may be 1, 2, 4, 8"),
    ),
    "EP against experts": (
        3,
        "--expert-model-parallel-size 3",
        ("--expert-model-parallel-size 3", "8 experts", "may be 1, 2, 4, 8"),
    ),
    "EP against world": (
        2,
        "--expert-model-parallel-size 4",
        ("--expert-model-parallel-size 4", "2 processes", "size 1, 2 would do"),
    ),
    "ETP follows TP": (
        8,
        "--tensor-model-parallel-size 2 --expert-model-parallel-size 8",
        (
            "--expert-model-parallel-size 8 x --expert-tensor-parallel-size 2 = 16",
            "8 processes",
            "--expert-tensor-parallel-size 1",
        ),
    ),
    "PP against layers": (
        3,
        "--pipeline-model-parallel-size 3",
        ("--pipeline-model-parallel-size 3", "4 layers", "1, 2, 4 stages"),
    ),
    "negative size": (1, "--context-parallel-size -2", ("--context-parallel-size -2", "at least 1")),
    "no virtual stages": (
        2,
        f"{PP2} --num-virtual-stages-per-pipeline-rank 0",
        ("--num-virtual-stages-per-pipeline-rank 0", "at least 1"),
    ),
    "VPP without PP": (
        1,
        "--num-virtual-stages-per-pipeline-rank 2",
        ("--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-size 2 or more"),
    ),
    "VPP against batch": (
        2,
        f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 3",
        ("--global-batch-size 3", "3 micro-batches", "use 2 or 4"),
    ),
    "VPP twice": (
        2,
        f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 1",
        ("--num-layers-per-virtual-pipeline-stage 1", "--num-virtual-stages-per-pipeline-rank 2", "keep one"),
    ),
    "VPP by layers on unequal stages": (
        2,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 1 --decoder-last-pipeline-num-layers 1",
        ("--num-layers-per-virtual-pipeline-stage 1", "unequal size", "--num-virtual-stages-per-pipeline-rank"),
    ),
    "VPP against layers": (
        2,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 3",
        ("--num-layers-per-virtual-pipeline-stage 3", "4 layers", "lower"),
    ),
    "trap 2": (
        2,
        f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 2 --no-overlap-p2p-communication",
        ("--no-overlap-p2p-communication", "--pipeline-model-parallel-size 2", "leave it out"),
    ),
    "uneven stages": (
        2,
        f"{PP2} --decoder-first-pipeline-num-layers 4",
        ("--decoder-first-pipeline-num-layers 4", "0 of 4 layers", "change it"),
    ),
    "layers beyond the model": (
        2,
        f"{PP2} --decoder-last-pipeline-num-layers 5",
        ("--decoder-last-pipeline-num-layers 5", "4 layers", "lower it"),
    ),
    "layout string short": (
        2,
        f"{PP2} --pipeline-model-parallel-layout Et|ttL",
        ("--pipeline-model-parallel-layout Et|ttL", "3 layers (t)", "model 4"),
    ),
    "layout string letter": (
        2,
        f"{PP2} --pipeline-model-parallel-layout Ed|ttL",
        ("--pipeline-model-parallel-layout Ed|ttL", "found 'd'", "E, t, m, L"),
    ),
    "layout string stages": (
        2,
        f"{PP2} --pipeline-model-parallel-layout Ett|t|tL",
        ("-layout Ett|t|tL", "3 stages", "use 2 or 4"),
    ),
    "sequence against CP": (
        2,
        "--context-parallel-size 2 --seq-length 30",
        ("--seq-length 30", "--context-parallel-size 2", "use 28 or 32"),
    ),
    "sequence beyond the context": (1, "--seq-length 8192", ("--seq-length 8192", "4096", "max_position_embeddings")),
    # ---- batches
    "odd batch": (4, "--global-batch-size 6", ("--global-batch-size 6", "data-parallel size 4", "use 4 or 8")),
    "batch below one step": (
        2,
        "--micro-batch-size 4 --global-batch-size 4",
        ("--global-batch-size 4", "--micro-batch-size 4", "use 8"),
    ),
    "no micro-batch": (1, "--micro-batch-size 0", ("--micro-batch-size 0", "at least 1")),
    "negative batch": (1, "--global-batch-size -8", ("--global-batch-size -8", "at least 1")),
    "evaluation batch": (
        2,
        "--global-batch-size 4 --eval-global-batch-size 3",
        ("--eval-global-batch-size 3", "data-parallel size 2", "use 2"),
    ),
    # ---- schedule
    "no iterations": (1, "--train-iters 0", ("--train-iters 0", "at least 1")),
    "iterations and samples": (1, "--train-samples 100", ("--train-iters", "--train-samples", "keep one")),
    "iterations and epochs": (
        1,
        f"{SFT} --data-path {{rows}} --train-epochs 2",
        ("--train-iters and --train-epochs are given", "keep one"),
    ),
    "epochs of text": (1, "--train-epochs 2", ("--train-epochs 2", "no effect without --sft", "add that")),
    "epochs of nothing": (
        1,
        "--sft --train-epochs 2",
        ("--mock-data has no place with --sft", "give them with --data-path"),
    ),
    "name of epochs elsewhere": (1, "--num-epochs 2", ("--num-epochs", "did you mean --train-epochs?")),
    "warm-up to the end": (1, "--lr-warmup-iters 20", ("--lr-warmup-iters 20", "--train-iters 10", "lower it")),
    "warm-up in samples": (1, "--lr-warmup-samples 5", ("--lr-warmup-samples 5", "--train-iters", "--lr-warmup-iters")),
    "warm-up twice": (
        1,
        "--lr-warmup-iters 2 --lr-warmup-fraction 0.1",
        ("--lr-warmup-iters 2", "--lr-warmup-fraction 0.1", "keep one"),
    ),
    "warm-up fraction": (1, "--lr-warmup-fraction 3", ("--lr-warmup-fraction 3.0", "below 1")),
    "min above max": (1, "--min-lr 1e-3", ("--min-lr 0.001", "--lr 0.0001", "lower it")),
    "not a rate": (1, "--lr nan", ("--lr nan", "a finite number, at least 0")),
    "WSD without decay": (1, "--lr-decay-style WSD", ("--lr-decay-style WSD", "--lr-wsd-decay-iters")),
    "weight decay that grows": (
        1,
        "--weight-decay-incr-style linear",
        ("--weight-decay-incr-style linear", "found None", "--start-weight-decay"),
    ),
    "schedule of two": (
        1,
        "--use-checkpoint-opt-param-scheduler --override-opt-param-scheduler",
        ("--use-checkpoint-", "--override-opt", "keep one"),
    ),
    "weights of nothing": (
        1,
        "--no-initialization",
        ("--no-initialization", "--init-from-scratch", "leave --no-initialization out"),
    ),
    "Xavier": (
        1,
        "--init-method-xavier-uniform",
        ("--init-method-xavier-uniform", "not supported", "--init-method-std"),
    ),
    "no seed": (1, "--seed 0", ("--seed 0", "from 1")),
    "evaluation interval": (1, "--eval-interval 0", ("--eval-interval 0", "at least 1", "--eval-iters 0")),
    "log interval": (1, "--log-interval 0", ("--log-interval 0", "at least 1")),
    "save interval": (1, "--save {tmp}/new --save-interval 0", ("--save-interval 0", "at least 1", "leave --save out")),
    "saves without a folder": (1, "--save-interval 5", ("--save-interval 5", "without --save", "add --save FOLDER")),
    "saves gradients without a folder": (
        1,
        "--save-wgrads-interval 1",
        ("--save-wgrads-interval 1", "no effect without --save", "add that"),
    ),
    "for clusters of others": (
        1,
        "--adlr-autoresume",
        ("--adlr-autoresume", "NVIDIA's own", "--exit-duration-in-mins"),
    ),
    "dropout": (1, "--hidden-dropout 1.5", ("--hidden-dropout 1.5", "below 1")),
    "workers": (1, "--num-workers -1", ("--num-workers -1", "at least 0")),
    # ---- recomputation and overlap
    "recompute selectively": (
        1,
        "--recompute-granularity selective --recompute-num-layers 1",
        ("--recompute-num-layers 1", "without --recompute-granularity full", "leave --recompute-num-layers out"),
    ),
    "recompute for nothing": (
        1,
        "--recompute-modules moe",
        ("--recompute-modules moe", "--recompute-granularity selective", "leave --recompute-modules out"),
    ),
    # ---- data
    "no data": (1, DATA, ("--data-path PREFIX", "--mock-data")),
    "two sources": (1, "--data-path {text}", ("--mock-data", "--data-path", "keep one")),
    "two kinds of paths": (
        1,
        f"{DATA} --data-path {{text}} --train-data-path {{text}}",
        ("--data-path", "--train-data-path", "keep one"),
    ),
    "data misspelt": (
        1,
        f"{DATA} --data-path {{tmp}}/txt",
        ("--data-path {tmp}/txt", "no file {tmp}/txt.idx", "preprocess_data.py"),
    ),
    "data without suffix": (
        1,
        f"{DATA} --data-path {{tmp}}/corpus",
        ("--data-path {tmp}/corpus", "{tmp}/corpus_text_document?"),
    ),
    "data with .bin": (1, f"{DATA} --data-path {{text}}.bin", ("--data-path {text}.bin", "without .bin", "{text}")),
    "data is a folder": (
        1,
        f"{DATA} --data-path {{in_folder}}",
        ("--data-path {in_folder}", "is a folder", "{in_folder}/text?"),
    ),
    "data without .idx": (1, f"{DATA} --data-path {{no_index}}", ("--data-path {no_index}", "no file {no_index}.idx")),
    "data no index": (
        1,
        f"{DATA} --data-path {{garbage}}",
        ("--data-path {garbage}", "not an index", "preprocess_data.py"),
    ),
    "data cut off": (
        1,
        f"{DATA} --data-path {{cut}}",
        ("--data-path {cut}", "290 bytes of the 300", "copy or make it again"),
    ),
    "index cut off": (
        1,
        f"{DATA} --data-path {{index_cut}}",
        ("--data-path {index_cut}", "60 bytes of at least 102", "copy or make it again"),
    ),
    "another vocabulary": (
        1,
        f"{DATA} --data-path {{other_vocabulary}}",
        ("--data-path {other_vocabulary}", "token 599", "vocabulary of 1024", "tokenize"),
    ),
    "weights in some places": (
        1,
        f"{DATA} --data-path 0.5 {{text}} {{text}}",
        ("--data-path", "the weight 0.5", "WEIGHT NAME WEIGHT NAME"),
    ),
    "weights swapped": (1, f"{DATA} --data-path {{text}} 1.0", ("--data-path", "the weight 1.0", "WEIGHT NAME")),
    "weights negative": (
        1,
        f"{DATA} --data-path -1 {{text}} 2 {{text}}",
        ("--data-path", "-1 2", "must not be negative"),
    ),
    "weights zero": (1, f"{DATA} --data-path 0 {{text}} 0 {{text}}", ("--data-path", "0 0", "nor all zero")),
    "blend in a file": (
        1,
        f"{DATA} --data-args-path {{blend}}",
        ("--data-args-path {blend}", "{tmp}/nowhere.idx", "preprocess_data.py"),
    ),
    "no blend file": (
        1,
        f"{DATA} --data-args-path {{tmp}}/none.txt",
        ("--data-args-path {tmp}/none.txt", "No such file", "readable file"),
    ),
    "per split no JSON": (
        1,
        f"{DATA} --per-split-data-args-path {{blend}}",
        ("--per-split-data-args-path {blend}", "not JSON", "train, valid and test"),
    ),
    "per split keys": (
        1,
        f"{DATA} --per-split-data-args-path {{per_split}}",
        ("--per-split-data-args-path {per_split}", "train, valid and test"),
    ),
    "no training data": (1, f"{DATA} --valid-data-path {{text}}", ("--train-data-path is missing", "none to train on")),
    "split and per split": (1, f"{DATA} --train-data-path {{text}} --split 9,1,0", ("--split 9,1,0", "leave it out")),
    "split of nothing": (1, f"{DATA} --data-path {{text}} --split 0,1,1", ("--split 0,1,1", "969,30,1")),
    "split in words": (1, f"{DATA} --data-path {{text}} --split train", ("--split train", "969,30,1")),
    "split in four": (1, f"{DATA} --data-path {{text}} --split 9,1,1,1", ("--split 9,1,1,1", "969,30,1")),
    "split without documents": (
        1,
        f"{DATA} --data-path {{twenty}} --split 969,30,1",
        ("--split 969,30,1", "none of the 20 documents of {twenty} for test", "leave --split out"),
    ),
    # ---- conversations
    "conversations made up": (1, "--sft", ("--mock-data", "no place with --sft", "--data-path")),
    "conversations from nowhere": (1, SFT, ("no data", "--data-path FILE.jsonl")),
    "conversations misspelt": (
        1,
        f"{SFT} --data-path {{tmp}}/row.jsonl",
        ("--data-path", "{tmp}/row.jsonl: no such file"),
    ),
    "conversations in a folder": (
        1,
        f"{SFT} --data-path {{tmp}}",
        ("--data-path", "is a folder", "name the files in it"),
    ),
    "conversations as text": (
        1,
        f"{SFT} --data-path {{tmp}}/plain.txt",
        ("--data-path", "plain.txt", "conversations come as JSON lines"),
    ),
    "conversations as tokens": (1, f"{SFT} --data-path {{text}}.bin", ("--data-path", "{text}.bin", ".jsonl")),
    "an empty file of conversations": (
        1,
        f"{SFT} --data-path {{tmp}}/empty.jsonl",
        ("--data-path {tmp}/empty.jsonl", "is empty", "one a line"),
    ),
    "packed in twos": (
        1,
        f"{SFT} --data-path {{rows}} --micro-batch-size 2",
        ("--micro-batch-size 2", "need 1", "--no-sft-packing"),
    ),
    "evaluated in twos": (
        1,
        f"{SFT} --data-path {{rows}} --eval-micro-batch-size 2 --eval-global-batch-size 2",
        ("--eval-micro-batch-size 2", "need 1", "--no-sft-packing"),
    ),
    "routed by a softmax": (
        1,
        "--moe-router-load-balancing-type aux_loss sinkhorn --moe-aux-loss-coeff 1e-2 1e-2",
        ("--moe-router-load-balancing-type sinkhorn", "another model", "--moe-router-bias-update-rate"),
    ),
    "routed by quantiles": (
        1,
        "--moe-router-load-balancing-type quantile_balancing",
        ("--moe-router-load-balancing-type quantile_balancing", "another model", "--moe-router-bias-update-rate"),
    ),
    "balanced by a loss of no weight": (
        1,
        "--moe-router-load-balancing-type seq_aux_loss",
        ("--moe-router-load-balancing-type seq_aux_loss has no effect without --moe-aux-loss-coeff; add that",),
    ),
    "the dense layers in chunks": (
        1,
        f"{SFT} --data-path {{rows}} --mlp-chunks-for-training 2 --moe-router-bias-update-rate 1e-3",
        ("--mlp-chunks-for-training 2 with --sft and --moe-router-bias-update-rate 0.001", "padding", "leave one out"),
    ),
    "configurations to files": (
        1,
        "--config-logger-dir {tmp}/new",
        ("--config-logger-dir /", "cannot copy process groups", "leave --config-logger-dir out"),
    ),
    "all-reduces that there are none of": (
        2,
        "--tensor-model-parallel-size 2 --symmetric-ar-type two_shot",
        ("--symmetric-ar-type two_shot is not supported", "reduce-scatters", "leave --symmetric-ar-type out"),
    ),
    "keys returned by a load": (
        1,
        "--dist-ckpt-strictness return_all",
        ("--dist-ckpt-strictness return_all is not supported", "use log_all"),
    ),
    "registered without buffers": (
        1,
        "--disable-symmetric-registration",
        ("--disable-symmetric-registration has no effect without --use-nccl-ub", "add that"),
    ),
    "virtual stages in groups": (
        2,
        f"{PP2} --microbatch-group-size-per-virtual-pipeline-stage 2",
        ("--microbatch-group-size-per-virtual-pipeline-stage 2 has no effect without", "--num-virtual-stages-per-"),
    ),
    "iteration 0": (
        1,
        "--load {ckpt} --save {ckpt} --ckpt-step 0",
        ("--ckpt-step 0: it must be at least 1",),
    ),
    "a log of no progress": (
        1,
        "--log-progress",
        ("--log-progress has no effect without --save; add that",),
    ),
    "left in the midst of a step": (
        1,
        "--exit-signal-handler-for-training",
        ("--exit-signal-handler-for-training is not supported", "without a checkpoint", "use --exit-signal-handler,"),
    ),
    "hashes of published weights": (
        1,
        f"{LOAD} --load {{hf}} --verify-integrity",
        ("--verify-integrity: --load {hf} has no integrity.json", "leave it out", "verified in any case"),
    ),
    "hashes of a checkpoint without": (
        1,
        f"{LOAD} --load {{ckpt}} --verify-integrity",
        ("--verify-integrity: {ckpt}/iter_0000020 has no integrity.json", "leave it out"),
    ),
    "phases of iterations": (
        1,
        "--phase-transition-iterations 5",
        ("--train-iters 10", "--phase-transition-iterations 5", "give --train-samples"),
    ),
    "hashes every 0 iterations": (
        1,
        "--check-weight-hash-across-dp-replicas-interval 0",
        ("--check-weight-hash-across-dp-replicas-interval 0: it must be at least 1",),
    ),
    "mean over ranks and over tokens": (
        2,
        "--ddp-average-in-collective",
        ("--ddp-average-in-collective", "mean over the tokens of a step", "--no-calculate-per-token-loss"),
    ),
    "logits that another loss keeps": (
        1,
        "--recompute-logits --cross-entropy-loss-fusion",
        ("--recompute-logits has no effect with --cross-entropy-loss-fusion", "keep one"),
    ),
    "profile beside nothing": (
        1,
        "--profile --use-pytorch-profiler",
        ("--use-pytorch-profiler", "beside --tensorboard-dir", "add that"),
    ),
    "profile of nothing": (
        1,
        "--profile --use-pytorch-profiler --tensorboard-dir {tmp}/new --profile-step-start 3 --profile-step-end 3",
        ("--profile-step-end 3", "above --profile-step-start 3"),
    ),
    "conversations by micro-batch": (
        1,
        f"{SFT} --data-path {{rows}} --no-calculate-per-token-loss",
        ("--no-calculate-per-token-loss", "--sft", "leave --no-calculate-per-token-loss out"),
    ),
    "conversations and masks": (
        1,
        f"{SFT} --data-path {{rows}} --eod-mask-loss",
        ("--eod-mask-loss", "no place with --sft", "leave --eod-mask-loss out"),
    ),
    "conversations in cycles": (
        1,
        f"{SFT} --data-path {{rows}} --dataloader-type cyclic",
        ("--dataloader-type", "seeded by epoch", "leave --dataloader-type out"),
    ),
    "conversations split twice": (
        1,
        f"{SFT} --data-path {{rows}} --valid-data-path {{rows}} --split 9,1,0",
        ("--split 9,1,0", "leave it out"),
    ),
    "conversations from two flags": (
        1,
        f"{SFT} --data-path {{rows}} --train-data-path {{rows}}",
        ("--data-path", "--train-data-path", "keep one"),
    ),
    "only validation": (1, f"{SFT} --valid-data-path {{rows}}", ("no data", "--data-path FILE.jsonl")),
    "Megatron's prompt formats": (
        1,
        f"{SFT} --data-path {{rows}} --sft-tokenizer-prompt-format identity",
        ("--sft-tokenizer-prompt-format", "chat template", "leave --sft-tokenizer-prompt-format out"),
    ),
    "no such truncation": (
        1,
        f"{SFT} --data-path {{rows}} --sft-truncation middle",
        ("--sft-truncation", "'middle'", "'left'"),
    ),
    "weights of conversations": (
        1,
        f"{SFT} --data-path 0.5 {{rows}} {{rows}}",
        ("--data-path", "the weight 0.5", "WEIGHT NAME"),
    ),
    "conversations twice": (
        1,
        f"{SFT} --data-path 1 {{rows}} 1 {{rows}}",
        ("--data-path {rows}", "the same file", "leave one out"),
    ),
    "a split of nothing": (1, f"{SFT} --data-path {{rows}} --split nan,1,0", ("--split nan,1,0",)),
    "a cache in a file": (
        1,
        f"{SFT} --data-path {{rows}} --data-cache-path {{rows}}/x",
        ("--data-cache-path {rows}/x", "is a file", "folder"),
    ),
    "packing of text": (1, "--no-sft-packing", ("--no-sft-packing", "no effect without --sft", "add that")),
    "truncation of text": (1, "--sft-truncation left", ("--sft-truncation", "--sft")),
    "evaluation on nothing": (
        1,
        "--no-mock-data --eval-iters 5 --data-path {text} --split 100,0,0",
        ("--eval-iters 5", "--split 100,0,0 leaves no data for validation", "--eval-iters 0"),
    ),
    "evaluation without validation data": (
        1,
        "--no-mock-data --eval-iters 5 --train-data-path {text}",
        ("--eval-iters 5", "no data for validation", "0"),
    ),
    "cache that is nowhere": (
        1,
        f"{DATA} --data-path {{text}} --dataloader-defer-npy-index-mmap",
        ("--dataloader-defer-npy-index-mmap", "--data-cache-path", "add it"),
    ),
    "cache for one data set": (
        1,
        f"{DATA} --data-path {{text}} --data-cache-path {{empty}} --dataloader-fast-cache-load",
        ("--dataloader-fast-cache-load", "--data-path", "--train-data-path"),
    ),
    "full validation": (
        1,
        "--full-validation",
        ("--full-validation", "--multiple-validation-sets", "leave --full-validation out"),
    ),
    "multiple validation sets": (
        1,
        "--multiple-validation-sets",
        ("--multiple-validation-sets", "--full-validation", "add that"),
    ),
    "the text's own cache is a file": (
        1,
        f"{DATA} --data-path {{tmp}}/in_the_way",
        ("--data-path", "{tmp}/in_the_way/cache", "is a file", "--data-cache-path"),
    ),
    "cache is a file": (
        1,
        f"{DATA} --data-path {{text}} --data-cache-path {{file}}",
        ("--data-cache-path {file}", "is a file", "give a folder"),
    ),
    # ---- weights
    "nothing to load": (1, LOAD, ("--load FOLDER", "--init-from-scratch")),
    "load misspelt": (
        1,
        f"{LOAD} --load {{tmp}}/ckpt2",
        ("--load {tmp}/ckpt2", "no such folder", "did you mean {tmp}/ckpt?"),
    ),
    "load misspelt, from scratch": (
        1,
        "--load {tmp}/ckpt2",
        ("--load {tmp}/ckpt2", "no such folder", "did you mean {tmp}/ckpt?"),
    ),
    "load empty": (1, f"{LOAD} --load {{empty}}", ("--load {empty}", "no checkpoint in it", "config.json")),
    "load a file": (1, f"{LOAD} --load {{file}}", ("--load {file}", "a file, not a folder")),
    "load one iteration": (
        1,
        f"{LOAD} --load {{ckpt}}/iter_0000010",
        ("--load {ckpt}/iter_0000010", "--load {ckpt} --ckpt-step 10"),
    ),
    "pretrained empty": (
        1,
        f"{LOAD} --pretrained-checkpoint {{empty}}",
        ("--pretrained-checkpoint {empty}", "no checkpoint in it", "config.json"),
    ),
    "tracker empty": (
        1,
        f"{LOAD} --load {{ckpt_empty_tracker}}",
        ("--load {ckpt_empty_tracker}", "names ''", "complete in it: 10", "--ckpt-step"),
    ),
    "tracker no number": (
        1,
        f"{LOAD} --load {{ckpt_bad_tracker}}",
        ("--load {ckpt_bad_tracker}", "names 'latest'", "--ckpt-step"),
    ),
    "save not finished": (
        1,
        f"{LOAD} --load {{ckpt_unfinished}}",
        ("--load {ckpt_unfinished}", "iter_0000020", "complete in it: 10", "--ckpt-step"),
    ),
    "no such step": (
        1,
        f"{LOAD} --load {{ckpt}} --ckpt-step 15",
        ("--ckpt-step 15", "iter_0000015 is missing", "complete in it: 10, 20"),
    ),
    "step of a folder that is empty yet": (
        1,
        f"{LOAD} --save {{empty}} --load {{empty}} --pretrained-checkpoint {{ckpt}} --ckpt-step 10",
        ("--ckpt-step 10: --load {empty} holds no checkpoint yet", "leave it out"),
    ),
    "step, and newer non-persistent ones": (
        1,
        f"{LOAD} --load {{ckpt}} --ckpt-step 10 --non-persistent-ckpt-type global",
        ("--ckpt-step 10 with --non-persistent-ckpt-type global", "leave --non-persistent-ckpt-type out"),
    ),
    "step of a model": (
        1,
        f"{LOAD} --load {{hf}} --ckpt-step 15",
        ("--ckpt-step 15", "Hugging Face folder", "leave it out"),
    ),
    "checkpoint of another model": (
        1,
        f"{LOAD} --load {{ckpt_other}}",
        ("--load {ckpt_other}", "missing", "give the --hf-model"),
    ),
    "checkpoint damaged": (
        1,
        f"{LOAD} --load {{ckpt_unreadable}}",
        ("--load {ckpt_unreadable}", "not a checkpoint's metadata", "copy the checkpoint"),
    ),
    "checkpoint hostile": (
        1,
        f"{LOAD} --load {{ckpt_hostile}}",
        ("--load {ckpt_hostile}", "'posix.system'", "do not load this file"),
    ),
    "optimizer distributed before": (
        1,
        f"{LOAD} --load {{ckpt_distributed}}",
        (
            "--load {ckpt_distributed}",
            "saved with --use-distributed-optimizer",
            "this run is in fp32 without",
            "--no-load-optim",
        ),
    ),
    "optimizer distributed now": (
        1,
        f"{LOAD} --load {{ckpt}} --use-distributed-optimizer",
        ("--load {ckpt}", "saved in fp32 without --use-distributed-optimizer", "this run is with", "--no-load-optim"),
    ),
    "optimizer in 16 bits now": (
        1,
        f"{LOAD} --load {{ckpt}} --bf16",
        ("--load {ckpt}", "saved in fp32", "this run is in 16 bits", "--no-load-optim"),
    ),
    "optimizer in 16 bits before": (
        1,
        f"{LOAD} --load {{ckpt_bf16}}",
        ("--load {ckpt_bf16}", "saved in 16 bits", "in fp32", "--no-load-optim"),
    ),
    "optimizer not saved": (
        1,
        f"{LOAD} --load {{ckpt_no_optimizer}}",
        ("--load {ckpt_no_optimizer}", "--no-save-optim", "add --no-load-optim"),
    ),
    "weights of another model": (
        1,
        f"{LOAD} --load {{other}}",
        ("--load {other}", "misshapen", "[1024, 64] is needed"),
    ),
    "weights of MTP missing": (
        1,
        f"{LOAD} --hf-model {{mtp}} --load {{hf}}",
        ("--load {hf}", "missing", "num_nextn_predict_layers"),
    ),
    "weights incomplete": (1, f"{LOAD} --load {{sharded}}", ("--load {sharded}", "are missing", "fetch them again")),
    "weights cut off": (
        1,
        f"{LOAD} --load {{truncated}}",
        ("--load {truncated}", "{truncated}/model.safetensors: truncated", "fetch the file again"),
    ),
    "own save folder, nothing to start from": (
        1,
        f"{LOAD} --load {{tmp}}/new --save {{tmp}}/new",
        ("--load {tmp}/new", "own --save folder", "--pretrained-checkpoint"),
    ),
    # ---- where to write
    "save to a file": (1, "--save {file}", ("--save {file}", "is a file", "give a folder")),
    "save below a file": (1, "--save {file}/x", ("--save {file}/x", "{file} is a file", "give a folder")),
    "Hugging Face folders below a file": (
        1,
        "--save-hf {file}/x",
        ("--save-hf {file}/x", "{file} is a file", "give a folder"),
    ),
    "Hugging Face folders among the checkpoints": (
        1,
        "--save {tmp}/new --save-hf {tmp}/new",
        ("--save-hf {tmp}/new", "the same folder as --save", "one of its own"),
    ),
    "Hugging Face folders never": (
        1,
        "--save-hf {tmp}/new --save-hf-interval 0",
        ("--save-hf-interval 0", "at least 1", "leave it out"),
    ),
    "an interval of no folders": (1, "--save-hf-interval 2", ("--save-hf-interval 2", "without --save-hf", "add that")),
    "translations from nowhere": (
        1,
        "--valid-translations {tmp}/none.jsonl",
        ("--valid-translations {tmp}/none.jsonl", "no such file"),
    ),
    "translations that are empty": (1, "--valid-translations {tmp}/empty.jsonl", ("--valid-translations", "is empty")),
    "translations of tokens that are dropped": (
        1,
        "--valid-translations {rows} --moe-expert-capacity-factor 1.5",
        ("--valid-translations {rows}", "--moe-expert-capacity-factor 1.5", "leave one out"),
    ),
    "translations without an evaluation": (
        1,
        "--valid-translations {rows} --eval-iters 0",
        ("--valid-translations {rows}", "--eval-iters is 0", "leave --valid-translations out"),
    ),
    "no translations at all": (
        1,
        "--valid-translations {rows} --valid-generate 0",
        ("--valid-generate 0", "at least 1"),
    ),
    "how many of no translations": (
        1,
        "--valid-generate 5",
        ("--valid-generate 5", "without --valid-translations", "add that"),
    ),
    "adapters over their base": (
        1,
        f"{LOAD} --load {{ckpt}} --save {{ckpt}} --lora-rank 8",
        ("--save {ckpt} holds the base, --load", "a folder of their own"),
    ),
    "begin anew over a run": (
        1,
        f"{LOAD} --load {{ckpt}} --save {{ckpt}} --finetune",
        ("--save {ckpt} holds a checkpoint", "--finetune would begin at iteration 0", "another --save"),
    ),
    "begin over the run itself": (
        1,
        f"{LOAD} --pretrained-checkpoint {{ckpt}} --save {{ckpt}}",
        ("--save {ckpt} holds", "--pretrained-checkpoint would begin at iteration 0", "give --load {ckpt} without"),
    ),
    "save over a run": (1, "--save {ckpt}", ("--save {ckpt}", "--init-from-scratch would overwrite", "another --save")),
    "save over a run again": (
        1,
        f"{LOAD} --load {{hf}} --save {{ckpt}}",
        ("--save {ckpt}", "--load {ckpt} --pretrained-checkpoint {hf}", "another --save"),
    ),
    "optimizer that cannot be resumed": (
        1,
        "--optimizer sgd --save {tmp}/new",
        ("--optimizer sgd", "cannot load it again", "--no-save-optim"),
    ),
    # ---- flags that Megatron takes, and that would do nothing or something else
    "frozen": (
        1,
        "--freeze-all-layers",
        ("--freeze-all-layers", "does not take", "with --train-only"),
    ),
    "frozen beside adapters": (
        1,
        "--lora-rank 8 --freeze *.router.*",
        ("--freeze *.router.* has no place with --lora-rank", "--lora-targets"),
    ),
    "adapters of no rank": (1, "--lora-rank 0 --lora-alpha 8", ("--lora-rank 0", "at least 1", "give one")),
    "no parameter": (1, "--train-only router", ("--train-only 'router': means no parameter", ".router.gate.weight'")),
    "frozen since": (
        1,
        f"{LOAD} --load {{ckpt}} --train-iters 50 --freeze *.router.*",
        ("--load {ckpt}", "decoder.layers.1.mlp.router.weight was trained", "now be frozen", "--no-load-optim"),
    ),
    "group for gathering": (1, "--create-all-gather-group", ("--create-all-gather-group", "does not take")),
    "weights on the CPU": (1, "--use-cpu-initialization", ("--use-cpu-initialization", "leave the model on the CPU")),
    "weights of the memory": (
        1,
        "--init-model-with-meta-device",
        ("--init-model-with-meta-device", "whatever the memory held", "leave --init-model-with-meta-device out"),
    ),
    "another chat template": (
        1,
        f"{SFT} --data-path {{rows}} --chat-template {{tmp}}/none.jinja",
        ("--chat-template ", "those in --hf-model", "leave --chat-template out"),
    ),
    "masks that nobody reads": (
        1,
        "--create-attention-mask-in-dataloader",
        ("--create-attention-mask-in-dataloader", "unread"),
    ),
    "another head": (1, "--fp8-output-proj", ("--fp8-output-proj", "16 bits or fp32", "leave --fp8-output-proj out")),
    "embedding's gradient later": (
        1,
        "--defer-embedding-wgrad-compute",
        ("--defer-embedding-wgrad-compute", "leave --defer-embedding-wgrad-compute out"),
    ),
    "FSDP": (1, "--use-megatron-fsdp", ("--use-megatron-fsdp", "FSDP", "shard with --use-distributed-optimizer")),
    "the other FSDP": (1, "--use-torch-fsdp2", ("--use-torch-fsdp2", "FSDP", "shard with --use-distributed-optimizer")),
    "a switch's companion alone": (
        1,
        "--profile-step-start 3",
        ("--profile-step-start 3", "no effect without --profile", "add that"),
    ),
    "a companion of one choice": (
        1,
        "--muon-momentum 0.9 --muon-num-ns-steps 7",
        ("--muon-num-ns-steps 7", "no effect without --optimizer muon", "leave --muon-num-ns-steps out"),
    ),
    "a companion of a size": (
        1,
        "--account-for-loss-in-pipeline-split",
        ("--account-for-loss-in-pipeline-split", "without --pipeline-model-parallel-size above 1"),
    ),
    "reinforcement learning": (
        1,
        "--rl-default-temperature 0.5",
        ("--rl-default-temperature 0.5", "not part of hymeg"),
    ),
    "other format": (1, "--ckpt-format torch", ("--ckpt-format torch", "torch_dist", "leave --ckpt-format out")),
    "tensorboard in a file": (
        1,
        "--tensorboard-dir {file}",
        ("--tensorboard-dir {file}", "is a file", "give a folder"),
    ),
    "optimizer from a package": (
        1,
        "--optimizer muon",
        ("--optimizer muon", "not installed", "pip install 'emerging-optimizers @ git+https://github.com/NVIDIA-NeMo/"),
    ),
    "local checkpoints": (
        1,
        "--non-persistent-ckpt-type local",
        ("--non-persistent-ckpt-type local", "not installed", "pip install 'hymeg[resiliency]'"),
    ),
    "instances of the optimizer": (
        2,
        "--num-distributed-optimizer-instances 2",
        ("--num-distributed-optimizer-instances 2", "not installed", "pip install einops"),
    ),
    "kept too seldom": (
        1,
        "--save {tmp}/new --save-interval 2 --save-retain-interval 3",
        ("--save-retain-interval 3", "--save-interval 2", "with 4 every"),
    ),
    "retained in a release's folder": (
        1,
        f"{LOAD} --load {{ckpt_release}} --save {{ckpt_release}} --save-interval 2 --save-retain-interval 4",
        ("--save-retain-interval 4: --save {ckpt_release} holds a release", "add --keep-last K"),
    ),
    "two recipes": (
        1,
        "--config {interval} --config {tmp}/other.yaml",
        ("--config {interval} and --config {tmp}/other.yaml are given, of which one would be read",),
    ),
    "decay from before the start": (
        1,
        "--lr-decay-style WSD --lr-wsd-decay-iters 8 --lr-warmup-iters 3",
        ("--lr-wsd-decay-iters 8", "--lr-warmup-iters 3 in 10 iters", "lower it"),
    ),
    "another batch size later": (
        1,
        "--step-batch-size-schedule 0:4",
        ("--train-iters 10", "--step-batch-size-schedule 0:4 changes", "give --train-samples"),
    ),
    "no gloo": (
        1,
        "--use-distributed-optimizer --disable-gloo-process-groups",
        ("--disable-gloo-process-groups", "leave it out", "--no-dist-ckpt-optim-fully-reshardable"),
    ),
    "local checkpoints for any layout": (
        1,
        "--use-distributed-optimizer --non-persistent-ckpt-type local",
        ("--non-persistent-ckpt-type local: Megatron fails", "add --no-dist-ckpt-optim-fully-reshardable"),
    ),
    "wandb": (1, "--wandb-project x", ("--wandb-project x", "not installed", "pip install 'hymeg[wandb]'")),
}

WRONG_ON_GPU: dict[str, tuple[str, ...]] = {
    "--async-save --save {tmp}/new": ("--async-save", "needs --use-persistent-ckpt-worker", "add that"),
    "--async-save --use-persistent-ckpt-worker --save {tmp}/new": (
        "--async-save",
        "not installed",
        "pip install 'hymeg[resiliency]', or give --async-strategy mcore",
    ),
    "--train-only *.router.* --delay-wgrad-compute": (
        "--delay-wgrad-compute has no place with --freeze or --train-only",
        "leave --delay-wgrad-compute out",
    ),
    "--moe-token-dispatcher-type flex": ("--moe-token-dispatcher-type flex", "needs deep_ep", "deepseek-ai/DeepEP"),
    "--moe-enable-deepep": ("--moe-enable-deepep", "needs deep_ep", "leave --moe-enable-deepep out"),
    "--enable-ft-package": ("--enable-ft-package", "not installed", "pip install 'hymeg[resiliency]'"),
    "--log-straggler": ("--log-straggler needs pynvml", "pip install nvidia-ml-py"),
    "--log-energy": ("--log-energy needs pynvml", "pip install nvidia-ml-py"),
    "--fp8-format hybrid --fp8-recipe delayed": ("--fp8-recipe delayed", "no run could be resumed", "use blockwise"),
    "--fp8-amax-history-len 1024": ("--fp8-amax-history-len 1024", "--fp8-recipe delayed, which is not supported"),
    "--context-parallel-size 2": ("--context-parallel-size 2 in fp32", "16 bits only", "add --bf16"),
    "--te-precision-config-file {tmp}/no.yaml": (
        "--te-precision-config-file",
        "no readable file",
        "give",
    ),
    f"{SFT} --data-path {{rows}} --expert-model-parallel-size 2 --bf16 --overlap-moe-expert-parallel-comm"
    " --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3": (
        "--overlap-moe-expert-parallel-comm with --sft and --moe-aux-loss-coeff 0.001",
        "padding",
        "leave one out",
    ),
    f"{SFT} --data-path {{rows}} --cuda-graph-impl transformer_engine": (
        "--cuda-graph-impl transformer_engine",
        "packed conversations",
        "--no-sft-packing",
    ),
    f"{SFT} --data-path {{rows}} --cuda-graph-impl transformer_engine --enable-cuda-graph": (
        "--cuda-graph-impl transformer_engine",
        "packed conversations",
    ),
    f"{SFT} --data-path {{rows}} --no-sft-packing --cuda-graph-impl full_iteration": (
        "--cuda-graph-impl full_iteration",
        "read on the CPU",
        "leave --cuda-graph-impl out",
    ),
}

WRONG_FOR_MEGATRON: dict[str, tuple[str, ...]] = {
    "--recompute-granularity full": ("recompute_method",),
    "--recompute-granularity full --recompute-method block": ("recompute_num_layers",),
    "--recompute-granularity selective --recompute-modules attn": ("recompute_modules", "attn"),
    "--overlap-param-gather": ("--overlap-param-gather only supported with distributed optimizer",),
    "--overlap-param-gather --use-distributed-optimizer": ("--overlap-grad-reduce",),
}
"""What Megatron's own validation refuses, in words that need nothing added."""

WRONG_ON_CPU: dict[str, tuple[str, ...]] = {
    "--fp8-format hybrid": ("--fp8-format hybrid", "Transformer Engine", "leave --fp8-format out"),
    "--fp4-format e2m1": ("--fp4-format e2m1", "Transformer Engine", "leave --fp4-format out"),
    "--fp16": ("--fp16", "bf16 or fp32", "leave --fp16 out"),
    "--transformer-impl transformer_engine": (
        "--transformer-impl transformer_engine",
        "takes local",
        "leave --transformer-impl out",
    ),
    "--moe-grouped-gemm": ("--moe-grouped-gemm", "Transformer Engine", "leave --moe-grouped-gemm out"),
    "--moe-token-dispatcher-type flex": ("--moe-token-dispatcher-type flex", "DeepEP", "use alltoall or allgather"),
    "--moe-enable-deepep": ("--moe-enable-deepep", "CUDA", "leave --moe-enable-deepep out"),
    "--cuda-graph-impl local": ("--cuda-graph-impl local", "CUDA", "leave --cuda-graph-impl out"),
    "--enable-cuda-graph": ("--enable-cuda-graph", "CUDA", "leave --enable-cuda-graph out"),
    "--cuda-graph-modules attn": ("--cuda-graph-modules attn", "CUDA", "leave --cuda-graph-modules out"),
    "--attention-backend flash": ("--attention-backend flash", "CUDA", "leave --attention-backend out"),
    "--distributed-backend nccl": ("--distributed-backend nccl", "gloo", "leave --distributed-backend out"),
    "--moe-permute-fusion": ("--moe-permute-fusion", "Transformer Engine", "leave --moe-permute-fusion out"),
    "--rope-fusion": ("--rope-fusion", "Transformer Engine", "leave --rope-fusion out"),
    "--gradient-accumulation-fusion": (
        "--gradient-accumulation-fusion",
        "CUDA",
        "leave --gradient-accumulation-fusion out",
    ),
    "--overlap-moe-expert-parallel-comm": (
        "--overlap-moe-expert-parallel-comm",
        "CUDA",
        "leave --overlap-moe-expert-parallel-comm out",
    ),
    "--use-precision-aware-optimizer": (
        "--use-precision-aware-optimizer",
        "Transformer Engine",
        "leave --use-precision-aware-optimizer out",
    ),
    "--optimizer-cpu-offload": ("--optimizer-cpu-offload", "on the CPU already", "leave --optimizer-cpu-offload out"),
    "--tp-comm-overlap": ("--tp-comm-overlap", "Transformer Engine", "leave --tp-comm-overlap out"),
    "--fp32-residual-connection --bf16": (
        "--fp32-residual-connection",
        "one dtype",
        "leave --fp32-residual-connection out",
    ),
    "--recompute-granularity selective --recompute-modules mlp layernorm": (
        "--recompute-modules layernorm",
        "Transformer Engine",
        "out of the list",
    ),
    "--no-dist-ckpt-optim-fully-reshardable": ("--no-dist-ckpt-optim-fully-reshardable", "cannot be resumed", "out"),
    "--async-save --save {tmp}/new": ("--async-save", "wait for ever", "leave --async-save out"),
    "--cp-comm-type a2a --context-parallel-size 2": ("--cp-comm-type a2a", "gathers", "leave --cp-comm-type out"),
    "--save-tokens-per-expert-interval 2 --save {tmp}/new": ("--save-tokens-per-expert-interval 2", "do not count"),
    "--log-energy": ("--log-energy", "a GPU's power", "leave --log-energy out"),
    "--te-precision-config-file {file}": ("--te-precision-config-file", "Transformer Engine", "out"),
    "--save-activations-interval 2 --save {tmp}/new": ("--save-activations-interval 2", "Transformer Engine's layers"),
    "--save-dgrads-interval 2 --save {tmp}/new": ("--save-dgrads-interval 2", "Transformer Engine's layers"),
    "--profile": ("--profile", "CUDA", "add --use-pytorch-profiler"),
}
