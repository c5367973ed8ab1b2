"""The glossary: the name of every figure, one sentence on it, and its formula."""

ENTRIES: dict[str, tuple[str, str, str]] = {
    "true_reward": ("true reward", "Reward of a response under the rule that produced the labels.", "R(x, y)"),
    "score": ("RM score", "Score of the reward model that PPO was trained on, minus a constant.", "r(x, y)"),
    "judge": (
        "judge",
        "Score of a reward model trained on pairs that none of the compared models were trained on.",
        "r_judge(x, y)",
    ),
    "kl": (
        "KL",
        "Distance from the reference per response: the exact KL over the vocabulary at each position, summed over the "
        "positions of sampled responses.",
        "E_y Σ_t KL(π(·|x, y<t) ‖ π_ref(·|x, y<t))",
    ),
    "kl_k1": ("KL (k1)", "KL estimated from log-ratios of sampled tokens: unbiased, noisier.", "E Σ_t log π/π_ref"),
    "kl_k3": (
        "KL (k3)",
        "KL estimated by an unbiased form that is never negative.",
        "E Σ_t (π_ref/π − 1 − log π_ref/π)",
    ),
    "length": ("length", "Tokens of a response, including its end token.", "|y|"),
    "ended": ("ended by EOS", "Share of responses that end with EOS instead of being cut.", "P(y ends in EOS)"),
    "well_formed": (
        "well formed",
        "Share of responses that the grammar of the built-in world accepts.",
        "P(y ∈ grammar)",
    ),
    "entropy": ("entropy", "Entropy of the policy's responses, in nats.", "−E log π(y|x)"),
    "context_tokens": ("context", "Tokens of the demonstrations in the context of a prompt.", "|d|"),
    "tokens_read": (
        "tokens read",
        "Tokens that the model reads for one response: demonstrations, prompt and response, of all candidates.",
        "|d| + |x| + |y|",
    ),
    "tokens_generated": ("tokens generated", "Tokens of all candidates of one response.", "Σ |y_i|"),
    "copies": ("copies", "Share of candidates that are equal or nearly equal to a demonstration.", "2 M / (|a| + |b|)"),
    "only_copies": ("only copies", "Share of responses all of whose candidates are copies.", "P(all are copies)"),
    "win_rate": (
        "win rate",
        "How often a response scores higher than the other side's response to the same prompt; a tie counts one half. "
        "Demonstrations are held-out responses from the data of the SFT model.",
        "P(a > b) + ½ P(a = b)",
    ),
    "length_controlled": (
        "at equal length",
        "Win rate at equal length, as a logistic model predicts it.",
        "logit P = θ + φ tanh(Δlen / sd(Δlen)), σ(θ)",
    ),
    "elo": ("Elo", "Bradley-Terry strength on the Elo scale of chess.", "P(a > b) = 1 / (1 + 10^((E_b − E_a) / 400))"),
    "matched_kl": (
        "matched KL",
        "Both arms compared at one KL, interpolated within the range of each arm and never extrapolated.",
        "R_a(KL) − R_b(KL)",
    ),
    "gibbs": (
        "exact frontier",
        "The largest reward that any policy can have at a given KL; the optimal policies of all β reach it.",
        "π* ∝ π_ref exp(R / β)",
    ),
    "kl_bound": ("KL of best of n", "An upper bound, loose where responses repeat.", "log n − (n − 1)/n"),
    "share": (
        "share",
        "The part of the optimum's gain over the reference that a model reaches.",
        "(J − J_ref) / (J* − J_ref)",
    ),
    "effective_beta": (
        "effective β",
        "PPO's β in units of the reward that the labels were drawn from; s is the reward model's calibration "
        "slope on held-out pairs.",
        "kl_coef · s, P(label) = σ(s (r_w − r_l))",
    ),
    "gap": (
        "βKL(π‖π*)",
        "Distance from the optimum, in units of reward; J is the objective.",
        "J* − J(π) = β KL(π ‖ π*)",
    ),
    "gao": ("over-optimisation", "Gain in reward as a function of d = √KL (Gao et al. 2022).", "d (α − β ln d)"),
    "ece": (
        "ECE",
        "Mean distance between confidence and accuracy over bins of equally many pairs; prompts weigh the same.",
        "Σ_b w_b |acc_b − conf_b|, w_b: share of the weight",
    ),
    "nll": ("NLL", "Log loss of the labels; a coin has log 2 = 0.693.", "−mean log σ(r_w − r_l)"),
    "brier": ("Brier", "Squared error of the probability; a coin has 0.25.", "mean (1 − σ(r_w − r_l))²"),
    "distinct": (
        "distinct-n",
        "Share of distinct n-grams among a fixed number of tokens.",
        "|set of n-grams| / |n-grams|",
    ),
    "self_bleu": (
        "self-BLEU",
        "Overlap of a response with the other responses to its prompt; 1 if all are the same.",
        "mean BLEU(y, others)",
    ),
    "flops": (
        "FLOPs",
        "Cost of training: a backward pass counts as two forward passes; frozen models only run forward.",
        "≈ 6 N per trained token, 2 N per scored one",
    ),
    "interval": (
        "95 % interval",
        "Over prompts, with the samples of a prompt as one cluster; over seeds by Student's t.",
        "[low, high]",
    ),
    "p_holm": (
        "p (Holm)",
        "p-value corrected for the number of contrasts.",
        "max over j ≤ k of min(1, (m − j + 1) p_(j))",
    ),
}
