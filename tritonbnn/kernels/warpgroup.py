"""What kernels on the warpgroup's 16-bit tensor core share: numbers with signs of packed words."""

from triton.experimental.gluon import language as gl

SIGNED = gl.constexpr("""{
.reg .b32 signs;
shl.b32 signs, $1, $3;
and.b32 signs, signs, 0x80008000;
xor.b32 $0, signs, $5;
}""")
"""Two numbers of 16 bits, $0: those of $5, each with its sign changed where a bit of the word $1 is
set. The bits are 16 apart, and $3 moves them to where the signs are. $2 and $4 are as $1 and $3,
for the other number."""
