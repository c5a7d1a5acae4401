//! Drive a Tenon plugin without a VM.
