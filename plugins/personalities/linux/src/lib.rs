//! Personality: boots Linux kernels.
