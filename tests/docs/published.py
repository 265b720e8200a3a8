"""What the READMEs and programs of the four projects have: their commands, flags and checkpoints, by section of the guide.

Flags with a `--` are argparse's; FBI-LLM's programs, on python-fire, name them as variables.
"""

PUBLISHED = {
    "FBI-LLM": """
        fully_qat.py analysis.py eval.py sbatch_train.sh sbatch_eval.sh sbatch_analysis.sh save_bnn load_bnn datautils.py
        tag model_size n_nodes n_devices_per_node per_device_batch_size accumulate_grad_batches train_data_dir skip_chunk
        use_kd run_wandb model_name from_scratch fully_qat_record analyse_result flip_num flip_rate ave_flip_rate
        --path --eval_open_src --task --ckpt_ids --model_size --ckpt_type --exist_extra_para --batch_size eval_result
        ppl boolq mmlu storycloze storycloze_2016 storycloze_2018 130M 1.3B 7B 13B
        LiqunMa/FBI-LLM_130M LiqunMa/FBI-LLM_1.3B LiqunMa/FBI-LLM_7B
    """,
    "OneBit": """
        build_start_ckpt.py llama_7b.sh llama_13b.sh llama2_7b.sh llama2_13b.sh train_bash.py FILE.json FILE.yaml
        convert_llama_to_infer_ckpt.py evaluation/lm_eval.py dataset_info.json ds_config.json hostfile trainer_log.jsonl
        --teacher_model_name_or_path --kd_loss_scale --kd_alpha --kd_beta --kd_gamma --r_low_rank
        --model_name_or_path --cache_dir --use_fast_tokenizer --split_special_tokens --quantization_bit --quantization_type
        --double_quantization --rope_scaling --checkpoint_dir --flash_attn --shift_attn --plot_loss
        --template --dataset --dataset_dir --split --cutoff_len --streaming --buffer_size --mix_strategy --interleave_probs
        --max_samples --val_size --sft_packing --cache_path --train_on_prompt --system_prompt
        --stage --finetuning_type --lora_rank --lora_alpha --lora_dropout --lora_target --num_layer_trainable
        --upcast_layernorm --neft_alpha --do_sample --temperature --top_p --top_k --max_new_tokens
        --num_train_epochs --per_device_train_batch_size --gradient_accumulation_steps --learning_rate --lr_scheduler_type
        --warmup_steps --adam_beta1 --adam_beta2 --weight_decay --fp16 --gradient_checkpointing --deepspeed --save_steps
        --logging_steps --output_dir --seed
        multigpu batch_size net model_family eval_ppl seed model tasks num_fewshot limit ptb ptb-new c4-new pile mix
        LLaMA-7B LLaMA-13B LLaMA2-7B LLaMA2-13B Drive
    """,
    "BitNet-Transformers": """
        train_wikitext.sh train_korean_sample.sh run_clm.py modeling_llama.py save_binarized_weights notebooks
        --model_name_or_path --model_type --config_overrides --config_name --tokenizer_name --cache_dir
        --use_fast_tokenizer --model_revision --token --trust_remote_code --torch_dtype --low_cpu_mem_usage
        --dataset_name --dataset_config_name --train_file --validation_file --max_train_samples --max_eval_samples
        --streaming --block_size --overwrite_cache --validation_split_percentage --preprocessing_num_workers
        --keep_linebreaks --do_train --do_eval --optim --learning_rate --num_train_epochs --per_device_train_batch_size
        --gradient_accumulation_steps --bf16 --save_strategy --save_total_limit --report_to beomi/llama-2-ko-7b
    """,
    "PB-LLM": """
        gptq_pb/run.py run_all.sh qat/run_qat.py qat/eval_after_qat.py mmlu_avg.py evaluate_model gptq_pb/outputs/mask
        wikitext2 ptb c4 xnor sign no 2bit 4bit prune
        --plot --load_quantized --seed --nsamples --percdamp --low_frac --blocksize --groupsize --salient_metric magnitude
        hessian --high_bit --minlayer --maxlayer --quant_only --invert --save --disable_gptq --log_wandb
        --model_id --dataset Abirate/english_quotes red_pajama --data_percent -s --train_steps --binarization_method
        xnor_outlier xnor_outlier_hessian --outlier_fraction
        tasks llmqat mmlu eval_ppl num_fewshot limit batch_size facebook/opt-350m huggyllama
    """,
}
