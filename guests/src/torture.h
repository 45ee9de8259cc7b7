/* Layout of struct torture (gs:0 is itself) and of its register sets, for C and assembly. */
#define R_GPR 0        /* 16 x 8 */
#define R_FLAGS 128
#define R_SEG 136      /* ds es fs gs, 8 bytes each */
#define R_FS0 168      /* the words at fs:0 and gs:0 */
#define R_GS0 176
#define R_K 184        /* 8 x 8 */
#define R_FX 256       /* fxsave area, 512 */
#define R_VEC 768      /* 32 x 64 */
#define R_SIZE 2816
#define T_STACK 8
#define T_SPINS 16
#define T_SPINS2 24
#define T_LEVEL 32
#define T_WANT 64
#define T_GOT (T_WANT + R_SIZE)
