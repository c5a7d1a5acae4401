//! Random instructions of a given form, and operands that provoke.

use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix, OpCodeOperandKind,
    OpCodeTableKind,
};

/// SplitMix64.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer with a liking for edges.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(4),
            1 => self.below(4).wrapping_neg(),
            2 => 1 << self.below(64),
            3 => (1_u64 << self.below(64)).wrapping_sub(1),
            4 => self.pick(&[
                0x7f,
                0x80,
                0x7fff,
                0x8000,
                0x7fff_ffff,
                0x8000_0000,
                i64::MAX as u64,
                i64::MIN as u64,
            ]),
            5 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }

    /// A float of `exponent` and `mantissa` bits with a liking for edges.
    pub fn float(&mut self, exponent: u32, mantissa: u32) -> u64 {
        let (top, ones) = ((1_u64 << exponent) - 1, (1_u64 << mantissa) - 1);
        let sign = self.below(2) << (exponent + mantissa);
        let middle = top / 2;
        let e = match self.below(10) {
            0 => 0,
            1 => top,
            2 => top - 1,
            3 => 1,
            4..=7 => (middle as i64 + self.below(70) as i64 - 35).clamp(1, top as i64 - 1) as u64,
            _ => self.next() & top,
        };
        let m = match self.below(8) {
            0 | 1 => 0,
            2 => 1,
            3 => ones,
            4 => 1 << (mantissa - 1),
            5 => ones & !0 << self.below(mantissa.into()),
            _ => self.next() & ones,
        };
        sign | e << mantissa | m
    }

    /// An 80-bit float, valid or not.
    pub fn float80(&mut self) -> u128 {
        let sign = (self.below(2) as u128) << 79;
        let e = match self.below(10) {
            0 => 0,
            1 => 0x7fff,
            2 => 0x7ffe,
            3 => 1,
            4 => 0x3fff + self.below(64),
            5 => self.pick(&[
                0x3fff - 1023,
                0x3fff + 1024,
                0x3fff - 127,
                0x3fff + 128,
                0x3fff + 15,
                0x3fff + 31,
                0x3fff + 63,
            ]),
            6..=8 => 0x3fff - 40 + self.below(80),
            _ => self.next() & 0x7fff,
        };
        let fraction = match self.below(8) {
            0 | 1 => 0,
            2 => 1,
            3 => u64::MAX >> 1,
            4 => 1 << 62,
            5 => !0 << self.below(62),
            _ => self.next(),
        };
        let explicit = match (e, self.below(16)) {
            (0, n) => n & 1,
            (_, 0) => 0,
            _ => 1,
        };
        sign | u128::from(e) << 64 | u128::from(explicit << 63 | fraction & u64::MAX >> 1)
    }

    /// Sixteen bytes: integers, floats or doubles.
    pub fn vector(&mut self) -> u128 {
        match self.below(4) {
            0 => u128::from(self.integer()) << 64 | u128::from(self.integer()),
            1 => u128::from(self.float(11, 52)) << 64 | u128::from(self.float(11, 52)),
            2 => (0..4).fold(0, |v, i| v | u128::from(self.float(8, 23)) << (32 * i)),
            _ => (0..8).fold(0, |v, i| v | u128::from(self.integer() as u16) << (16 * i)),
        }
    }

    /// A FXSAVE64 image that FXRSTOR accepts.
    pub fn fp_image(&mut self) -> [u8; 512] {
        let mut image = [0; 512];
        let masks = if self.one_in(4) { self.next() as u16 & 0x3f } else { 0x3f };
        let fcw = 0x40 | masks | self.pick(&[0, 2, 3]) << 8 | (self.below(4) as u16) << 10;
        let mut flags = if self.one_in(2) { self.next() as u16 & 0x7f } else { 0 };
        if !self.one_in(16) {
            flags &= masks | 0x40;
        }
        let mut fsw = self.next() as u16 & 0x7f00 | flags;
        if self.one_in(2) {
            fsw &= !0x3800;
        }
        if fsw & !fcw & 0x3f != 0 {
            fsw |= 0x8080;
        }
        let ftw = match self.below(4) {
            0 => self.next() as u8,
            1 => 0,
            _ => 0xff,
        };
        let exceptions = if self.one_in(4) { self.next() as u32 & 0x1f80 } else { 0x1f80 };
        let mxcsr = exceptions
            | (self.below(4) as u32) << 13
            | u32::from(self.one_in(4)) << 15
            | u32::from(self.one_in(4)) << 6
            | if self.one_in(2) { self.next() as u32 & 0x3f } else { 0 };
        image[0..2].copy_from_slice(&fcw.to_le_bytes());
        image[2..4].copy_from_slice(&fsw.to_le_bytes());
        image[4] = ftw;
        image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
        let small = self.one_in(3);
        for i in 0..8 {
            let value = if small && i < 2 {
                u128::from(self.next() & 0x7fff_ffff_ffff_ffff | 1 << 63) | 0x3ffe << 64
            } else {
                self.float80()
            };
            image[32 + 16 * i..42 + 16 * i].copy_from_slice(&value.to_le_bytes()[..10]);
        }
        for i in 0..16 {
            image[160 + 16 * i..176 + 16 * i].copy_from_slice(&self.vector().to_le_bytes());
        }
        image
    }
}

/// 64- or 32-bit machine code of the form `code` with random operands, decoded at `ip`; `None` if it has no such encoding.
pub fn instruction(random: &mut Random, code: Code, ip: u64, bits: u32) -> Option<(Vec<u8>, Instruction)> {
    let form = code.op_code();
    if !(if bits == 64 { form.mode64() } else { form.mode32() }) || form.encoding() != EncodingKind::Legacy {
        return None;
    }
    for _ in 0..64 {
        let mut bytes = Vec::with_capacity(32);
        if random.one_in(32) {
            bytes.push(0x67);
        }
        if random.one_in(32) {
            bytes.push(random.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x65]));
        }
        if random.one_in(64) {
            bytes.push(random.pick(&[0x66, 0xf2, 0xf3]));
        }
        if form.can_use_lock_prefix() && random.one_in(3) {
            bytes.push(0xf0);
        }
        if (form.can_use_rep_prefix() || form.can_use_repne_prefix()) && random.one_in(2) {
            bytes.push(random.pick(&[0xf2, 0xf3]));
        }
        if form.fwait() {
            bytes.push(0x9b);
        }
        if form.operand_size() == 16 {
            bytes.push(0x66);
        }
        match form.mandatory_prefix() {
            MandatoryPrefix::P66 => bytes.push(0x66),
            MandatoryPrefix::PF3 => bytes.push(0xf3),
            MandatoryPrefix::PF2 => bytes.push(0xf2),
            _ => {}
        }
        let wide = form.operand_size() == 64 && !form.default_op_size64() || form.w() == 1;
        let mut rex = u8::from(wide) << 3;
        if random.one_in(2) {
            rex |= 0x40 | random.next() as u8 & 7;
        }
        if random.one_in(32) {
            rex |= 0x48;
        }
        if rex != 0 && bits == 64 {
            bytes.push(rex | 0x40);
        }
        match form.table() {
            OpCodeTableKind::Normal => {}
            OpCodeTableKind::T0F => bytes.push(0x0f),
            OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
            OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
            _ => return None,
        }
        let in_opcode = (0..form.op_count()).any(|n| {
            matches!(
                form.op_kind(n),
                OpCodeOperandKind::r8_opcode
                    | OpCodeOperandKind::r16_opcode
                    | OpCodeOperandKind::r32_opcode
                    | OpCodeOperandKind::r64_opcode
                    | OpCodeOperandKind::sti_opcode
            )
        });
        let plus = if in_opcode { random.below(8) as u8 } else { 0 };
        if form.op_code_len() == 2 {
            bytes.push((form.op_code() >> 8) as u8);
        }
        bytes.push(form.op_code() as u8 + plus);
        let start = bytes.len();
        for _ in 0..16 {
            bytes.push(random.next() as u8);
        }
        if form.op_code_len() == 1 && form.is_group() {
            bytes[start] = bytes[start] & !0x38 | (form.group_index() as u8) << 3;
        }
        if form.op_code_len() == 1 && form.is_rm_group() {
            bytes[start] = 0xc0 | bytes[start] & 0x38 | form.rm_group_index() as u8;
        }
        bytes.truncate(15);
        let mut decoder = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::AMD);
        let decoded = decoder.decode();
        if decoded.is_invalid() || decoded.code() != code {
            continue;
        }
        let offsets = decoder.get_constant_offsets(&decoded);
        bytes.truncate(decoded.len());
        // Random displacements rarely reach anything; small ones do. Immediates like edges.
        if offsets.displacement_size() >= 4 {
            let at = offsets.displacement_offset();
            let value = if decoded.is_ip_rel_memory_operand() {
                (super::native::DATA + random.below(super::native::DATA_SIZE as u64))
                    .wrapping_sub(ip + bytes.len() as u64) as i32
            } else if decoded.memory_base() == iced_x86::Register::None {
                (super::native::DATA + random.below(super::native::DATA_SIZE as u64)) as i32
            } else {
                random.integer() as i32
            };
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if offsets.immediate_size() >= 2 && random.one_in(2) {
            let at = offsets.immediate_offset();
            let value = random.integer().to_le_bytes();
            bytes[at..at + offsets.immediate_size()].copy_from_slice(&value[..offsets.immediate_size()]);
        }
        let decoded = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::AMD).decode();
        if decoded.code() == code && decoded.len() == bytes.len() {
            return Some((bytes, decoded));
        }
    }
    None
}

/// Aims the memory operand at `target` by changing one of its registers; false if no register can.
pub fn aim(instruction: &Instruction, gpr: &mut [u64; 16], target: u64) -> bool {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let displacement = instruction.memory_displacement64();
    let value = |register: iced_x86::Register, gpr: &[u64; 16]| {
        if register == iced_x86::Register::None { 0 } else { gpr[register.full_register().number()] }
    };
    if base.is_gpr() {
        let same = index.is_gpr() && index.full_register() == base.full_register();
        if same {
            gpr[base.full_register().number()] =
                target.wrapping_sub(displacement) / (1 + u64::from(instruction.memory_index_scale()));
            return true;
        }
        let scaled = value(index, gpr).wrapping_mul(instruction.memory_index_scale().into());
        gpr[base.full_register().number()] = target.wrapping_sub(displacement).wrapping_sub(scaled);
        return true;
    }
    if index.is_gpr() {
        gpr[index.full_register().number()] =
            target.wrapping_sub(displacement) / u64::from(instruction.memory_index_scale());
        return true;
    }
    false
}
