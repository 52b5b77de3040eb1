# Writes r_truth.json: what R's survival says about the data of tests/goldens/survival_*.json where the goldens are silent
# (k groups, strata, weights, log-log limits, medians, hazards). Run in the repository root: Rscript tests/survival/r_truth.R
library(survival)
library(jsonlite)

truth <- function(name) {
  d <- fromJSON(sprintf("tests/goldens/survival_%s.json", name))
  row <- seq_len(d$n) - 1
  # Columns that the test makes by the same rule.
  group <- row %% 3
  stratum <- (row %/% 3) %% 4
  weight <- 0.5 + row %% 5
  y <- Surv(d$time, d$event)

  logrank <- function(fit) {
    total <- function(x) if (is.matrix(x)) rowSums(x) else x
    list(chisq = fit$chisq, p = fit$pvalue, observed = total(fit$obs), expected = total(fit$exp))
  }
  median_of <- function(fit) unname(summary(fit)$table[c("median", "0.95LCL", "0.95UCL")])
  plain <- survfit(y ~ 1)
  log_log <- survfit(y ~ 1, conf.type = "log-log")
  cox <- function(ties, strata = FALSE, weighted = FALSE) {
    w <- if (weighted) weight else rep(1, d$n)
    risk <- d$risk
    f <- if (strata) y ~ risk + strata(stratum) else y ~ risk
    environment(f) <- environment()
    fit <- coxph(f, weights = w, ties = ties, init = 1, control = coxph.control(iter.max = 0))
    list(loglik = fit$loglik[1], martingale = unname(residuals(fit, "martingale")))
  }
  baseline <- function(ties) {
    risk <- d$risk
    fit <- coxph(y ~ risk, ties = ties, init = 1, control = coxph.control(iter.max = 0))
    basehaz(fit, centered = FALSE)$hazard
  }
  list(
    logrank_3 = logrank(survdiff(y ~ group)),
    logrank_2_strata = logrank(survdiff(y ~ (row %% 2) + strata(stratum))),
    logrank_3_strata = logrank(survdiff(y ~ group + strata(stratum))),
    km = list(censored = plain$n.censor, median_log = median_of(plain), median_log_log = median_of(log_log),
              lower_log_log = log_log$lower, upper_log_log = log_log$upper,
              lower_log_90 = survfit(y ~ 1, conf.int = 0.9)$lower),
    nelson_aalen = list(hazard = plain$cumhaz, std_error = plain$std.chaz),
    baseline = list(breslow = baseline("breslow"), efron = baseline("efron")),
    cox_strata = list(efron = cox("efron", strata = TRUE), breslow = cox("breslow", strata = TRUE)),
    cox_weighted = list(efron = cox("efron", weighted = TRUE), breslow = cox("breslow", weighted = TRUE)),
    cox_strata_weighted = list(efron = cox("efron", TRUE, TRUE), breslow = cox("breslow", TRUE, TRUE))
  )
}

names <- c("veteran", "lung", "pbc_years")
write_json(setNames(lapply(names, truth), names), "tests/survival/r_truth.json",
           digits = I(16), auto_unbox = TRUE, na = "null")
